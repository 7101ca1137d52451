"""Engines compared: who is set against whom, and what then holds."""

from __future__ import annotations

import pytest
from bench_rows import GIB, RESIDENT, SMALLEST, row

from blockswap.bench import compare
from blockswap.bench.command import settings_text
from blockswap.bench.compare import caps_to_run


def test_ours_never_peaks_above_the_engine_it_is_set_against() -> None:
    rows = [
        RESIDENT,
        SMALLEST,
        row("diffusers-block", 1.8, 467.0),
        row("blockswap", 1.79, 410.0),
        row("blockswap", 12.0, 220.0),
    ]
    (found,) = compare(rows)
    assert (found.kind, found.our_step_ms) == ("streams", 410.0)
    assert found.holds
    assert found.gap_mib < 0


def test_an_engine_below_our_smallest_plan_is_set_against_that_plan_and_the_gap_is_told() -> None:
    (found,) = compare([RESIDENT, SMALLEST, row("accelerate-sequential", 0.5, 4000.0)])
    assert found.kind == "below our smallest"
    assert found.our_step_ms == 470.0
    assert found.gap_mib == pytest.approx(0.1 * 1024, abs=1)


def test_what_was_freed_while_it_was_still_used_counts_as_the_engines_memory() -> None:
    theirs = row("diffusers-leaf", 0.5, 300.0)
    at_that_peak = row("blockswap", 4.0, 290.0)
    rows = [RESIDENT, SMALLEST, at_that_peak, row("blockswap", 4.2, 200.0)]
    (found,) = compare([*rows, theirs | {"peak_active_bytes": int(4.1 * GIB)}])
    assert (found.kind, found.our_step_ms, found.holds) == ("in use", 290.0, True)
    assert found.in_use_bytes == int(4.1 * GIB)
    (found,) = compare([*rows, theirs | {"peak_active_bytes": int(0.55 * GIB)}])
    assert (found.kind, found.holds) == ("below our smallest", False)


def test_ours_runs_within_what_an_engine_has_in_use_where_less_is_allocated() -> None:
    theirs = row("diffusers-leaf", 0.5, 300.0) | {"peak_active_bytes": int(4.1 * GIB)}
    assert int(4.1 * GIB) in caps_to_run([theirs], SMALLEST, RESIDENT)
    assert int(0.5 * GIB) not in caps_to_run([theirs], SMALLEST, RESIDENT)


def test_an_engine_within_our_plans_gets_no_more_than_what_it_has_allocated() -> None:
    theirs = row("diffusers-block", 1.8, 300.0) | {"peak_active_bytes": 9 * GIB}
    rows = [RESIDENT, SMALLEST, row("blockswap", 1.7, 290.0), row("blockswap", 8.0, 200.0)]
    (found,) = compare([*rows, theirs])
    assert (found.kind, found.our_step_ms) == ("streams", 290.0)


@pytest.mark.parametrize(("our_ms", "holds"), [(171.0, True), (175.0, False)])
def test_against_an_engine_that_keeps_all_weights_ours_may_take_one_per_cent_more(
    our_ms: float, holds: bool
) -> None:
    rows = [
        RESIDENT,
        SMALLEST,
        row("accelerate-model", 22.0, 170.0),
        row("blockswap", 22.3, our_ms),
    ]
    (found,) = compare(rows)
    assert found.kind == "keeps all"
    assert found.holds is holds


def test_against_an_engine_that_keeps_all_weights_the_shortest_steps_count() -> None:
    theirs = row("mmgp", 22.0, 173.6) | {"step_ms_min": 172.0}
    ours = row("blockswap", 22.3, 176.0) | {"step_ms_min": 171.5}
    (found,) = compare([RESIDENT, SMALLEST, theirs, ours])
    assert found.holds
    (found,) = compare([RESIDENT, SMALLEST, theirs, ours | {"step_ms_min": 174.0}])
    assert not found.holds


@pytest.mark.parametrize(("our_ms", "holds"), [(202.0, True), (203.0, False)])
def test_beside_an_engine_that_keeps_all_weights_what_each_took_over_its_twin_counts(
    our_ms: float, holds: bool
) -> None:
    theirs = row("mmgp", 22.0, 151.5) | {"step_ms_min": 150.0, "twin_ms": 150.0}
    ours = row("blockswap", 22.3, our_ms) | {"step_ms_min": our_ms, "twin_ms": 200.0}
    alone = row("blockswap", 22.2, 170.0)  # streams next to nothing, and had no twin
    (found,) = compare([RESIDENT, SMALLEST, theirs, alone, ours | {"step_ms": our_ms * 1.01}])
    assert found.our_step_ms == our_ms * 1.01
    assert found.holds is holds
    assert found.ratio == pytest.approx(1.01 / (our_ms * 1.01 / 200.0))


def test_an_engine_that_was_faster_than_its_twin_was_so_by_chance() -> None:
    theirs = row("accelerate-model", 22.0, 147.0) | {"twin_ms": 150.0}
    ours = row("blockswap", 22.3, 151.0) | {"twin_ms": 150.0}
    (found,) = compare([RESIDENT, SMALLEST, theirs, ours])
    assert found.holds


def test_a_slower_row_of_ours_does_not_hold() -> None:
    (found,) = compare([RESIDENT, SMALLEST, row("diffusers-leaf", 0.61, 460.0)])
    assert not found.holds
    assert found.ratio == pytest.approx(460 / 470)


def test_rows_that_failed_are_compared_with_nothing() -> None:
    failed = {"model": "flux", "engine": "mmgp", "settings": {}, "status": "failed: no"}
    assert compare([RESIDENT, SMALLEST, failed]) == []
    assert compare([RESIDENT, failed]) == []


def test_caps_are_the_peaks_of_engines_that_stream_and_neighbours_share_the_lower_one() -> None:
    peers = [
        row("diffusers-block", 1.80, 1.0),
        row("diffusers-block", 1.81, 1.0),
        row("diffusers-leaf", 0.7, 1.0),
        row("accelerate-sequential", 0.5, 1.0),
        row("accelerate-model", 22.0, 1.0),
        row("mmgp", 5.0, 1.0, status="failed: no"),
    ]
    midway = (SMALLEST["peak_allocated_bytes"] + RESIDENT["peak_allocated_bytes"]) // 2
    caps = caps_to_run(peers, SMALLEST, RESIDENT)
    assert caps == [int(0.7 * GIB), int(1.80 * GIB), midway]


def test_settings_are_told_in_few_words() -> None:
    settings = {"offload_type": "block_level", "num_blocks_per_group": 4, "use_stream": True}
    assert settings_text(settings) == "num_blocks_per_group=4 use_stream"
    assert settings_text({"record_stream": False}) == "default"
