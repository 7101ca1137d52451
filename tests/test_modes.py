"""The benchmark of modes: how it searches for a cap, what its verdicts say, and that it runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.modes import (
    TRIES,
    Lowest,
    bracket,
    find_lowest,
    is_rising,
    judge_lowest,
    judge_modes,
    judge_profiles,
    judged,
)

MIB = 2**20


def search(least: int, low: int, high: int, starts_low: bool = False, tries: int = TRIES) -> Lowest:
    """Search among caps of which the least that works is known."""
    return find_lowest(
        lambda cap: "" if cap >= least else "too small", low, high, tries, starts_low
    )


def caps(found: Lowest) -> list[int]:
    return [cap for cap, _ in found.tries]


def test_the_search_halves_what_lies_between_a_cap_that_fails_and_one_that_works() -> None:
    found = search(700, low=0, high=1000)
    assert caps(found) == [1000, 500, 750, 625]
    assert (found.fails_at_bytes, found.runs_at_bytes) == (625, 750)


def test_where_nothing_that_was_tried_failed_no_failure_is_claimed() -> None:
    found = search(1, low=0, high=1000)
    assert (found.fails_at_bytes, found.runs_at_bytes) == (None, 125)


def test_a_bound_that_was_believed_to_work_is_raised_until_one_does() -> None:
    found = search(2500, low=0, high=1000, tries=5)
    assert caps(found) == [1000, 2000, 3000, 2500, 2250]
    assert (found.fails_at_bytes, found.runs_at_bytes) == (2250, 2500)


def test_a_mode_that_never_runs_has_no_lowest_cap() -> None:
    found = search(10**9, low=0, high=1000)
    assert len(found.tries) == TRIES and found.runs_at_bytes is None


def test_another_mode_is_tried_where_layerwise_failed_and_no_further_down() -> None:
    found = search(700, low=600, high=1000, starts_low=True)
    assert caps(found) == [600, 1000, 800, 700]
    lower = search(500, low=600, high=1000, starts_low=True)
    assert caps(lower) == [600] and lower.runs_at_bytes == 600


def test_the_search_ends_where_nothing_lies_between() -> None:
    assert caps(search(10, low=9, high=10)) == [10]


def test_the_bracket_runs_from_what_tensors_need_to_what_pytorch_reserved() -> None:
    row = {
        "peak_device_bytes": 1000 * MIB,
        "peak_allocated_bytes": 900 * MIB,
        "resident_bytes": 500 * MIB,
        "ring_bytes": 100 * MIB,
        "weight_bytes": 9000 * MIB,
        "cap_bytes": 1024 * MIB,
    }
    assert bracket(row, 72 * MIB) == (372 * MIB, 472 * MIB + 2 * 16 * MIB)
    assert bracket(row | {"peak_device_bytes": 0}, 72 * MIB) == (72 * MIB, 9000 * MIB)


def test_times_may_be_a_little_out_of_order_and_peaks_may_not() -> None:
    assert is_rising([1, 2, 3]) and not is_rising([1, 1, 3])
    assert is_rising([100.0, 99.5, 99.0], 1.01) and not is_rising([100.0, 98.0], 1.01)


def test_profiles_are_judged_by_memory_and_by_time() -> None:
    rows = {
        "A balanced": {"status": "ok", "peak_device_bytes": 16, "step_ms": 100.0},
        "B memory": {"status": "ok", "peak_device_bytes": 14, "step_ms": 110.0},
        "C speed": {"status": "ok", "peak_device_bytes": 18, "step_ms": 90.0},
    }
    verdict = judge_profiles(rows)
    assert verdict["peak_rises_b_a_c"] and verdict["time_rises_c_a_b"]
    rows["C speed"] |= {"peak_device_bytes": 15, "step_ms": 102.0}
    verdict = judge_profiles(rows)
    assert not verdict["peak_rises_b_a_c"] and not verdict["time_rises_c_a_b"]


def of_mode(pieces: int, copies: int, step_ms: float) -> dict[str, object]:
    figures = {"num_pieces": pieces, "copies_per_step": copies, "step_ms": step_ms}
    return {"status": "ok"} | figures


def test_modes_are_judged_by_pieces_and_by_copies_apart() -> None:
    rows = {
        "layerwise": of_mode(845, 500, 100.0),
        "chunkwise": of_mode(540, 400, 99.0),
        "adaptive": of_mode(480, 300, 98.0),
    }
    verdict = judged("modes", judge_modes, rows)
    assert verdict["layerwise_has_more_copies"] and verdict["chunkwise_is_as_fast"]
    rows["chunkwise"] |= {"copies_per_step": 500}
    verdict = judge_modes(rows)
    assert verdict["layerwise_has_more_pieces"] and not verdict["layerwise_has_more_copies"]
    rows["adaptive"]["status"] = "CapError: no"
    assert judged("modes", judge_modes, rows) == {"verdict": "modes", "status": "refused: adaptive"}


@pytest.mark.parametrize(
    ("layerwise", "others", "expected"),
    [
        (Lowest(90, 100), [Lowest(90, 120), Lowest(110, 130)], True),
        (Lowest(90, 100), [Lowest(90, 95), Lowest(90, None)], True),  # between the two: as low
        (Lowest(90, 100), [Lowest(None, 90), Lowest(90, 120)], False),
        (Lowest(None, 100), [Lowest(50, 100), Lowest(50, 101)], True),
        (Lowest(None, 100), [Lowest(50, 99), Lowest(50, 101)], False),
        (Lowest(100, None), [Lowest(100, None), Lowest(100, None)], False),
    ],
)
def test_layerwise_is_lowest_if_no_mode_runs_where_it_fails(
    layerwise: Lowest, others: list[Lowest], expected: bool
) -> None:
    lowest = {"layerwise": layerwise, "chunkwise": others[0], "adaptive": others[1]}
    assert judge_lowest(lowest)["layerwise_is_lowest"] is expected


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="counts on a CPU's peaks")
def test_all_of_it_runs_at_toy_size(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    command = [sys.executable, "-m", "benchmarks.modes", "--size", "tiny", "--steps", "1"]
    # Some hundred pieces a step: checks after each action would take minutes.
    quick = os.environ | {"BLOCKSWAP_CHECK": "0"}
    subprocess.run([*command, "--out", str(out)], check=True, capture_output=True, env=quick)
    rows = json.loads(out.read_text())["rows"]
    measured = [row for row in rows if "settings" in row]
    assert [row["status"] for row in measured] == ["ok"] * 6
    assert all(row["bit_identical"] and row["holds"] for row in measured)
    assert all(row["link_gb_per_s"] == 25.0 for row in measured)
    verdicts = {row["verdict"]: row for row in rows if "verdict" in row}
    assert verdicts["profiles"]["peak_rises_b_a_c"]
    # Not copies: which pieces stay follows from times, which nobody can foretell.
    assert verdicts["modes"]["layerwise_has_more_pieces"]
    assert verdicts["lowest cap"]["layerwise_is_lowest"]
    found = [row for row in rows if "lowest_cap" in row]
    # A CPU has no activations to count: each lower cap that is tried runs.
    assert len(found) == 3 and all(row["runs_at_bytes"] for row in found)
