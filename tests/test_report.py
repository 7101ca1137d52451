"""Report and Timeline: what people and scripts read after a run."""

import dataclasses
import json
import sys

import pytest

from blockswap.report import BlockStall, PieceSpan, Report, Timeline

GIB, MIB = 2**30, 2**20


@pytest.fixture
def report():
    return Report(
        model="FluxTransformer2DModel",
        device="cuda:0",
        state="ready",
        steps=20,
        cap_bytes=10 * GIB,
        weight_bytes=23 * GIB,
        leaf_bytes=22 * GIB,
        resident_bytes=8 * GIB,
        ring_bytes=256 * MIB,
        fixed_bytes=122 * MIB,
        activation_bytes=640 * MIB,
        host_bytes=22 * GIB,
        pinned_bytes=22 * GIB,
        streamed_bytes=14 * GIB,
        copies_per_step=233,
        link_gb_per_s=55.0,
        step_ms=300.0,
        stall_ms=130.0,
        predicted_ms=310.0,
        bound_ms=285.0,
        overlap=0.52,
        num_pieces=350,
        num_resident_pieces=117,
        stalls=tuple(BlockStall(f"blocks.{i}", float(i), 200 * MIB, 54.0) for i in range(12)),
        notes=("blocks.3.attn [whole]: its processor reads weights directly",),
        explain="the plan",
    )


def span(piece, copy=(0.0, 0.0), wait=(0.0, 0.0), run_end_ms=0.0, num_bytes=0):
    return PieceSpan(
        piece, f"blocks.{piece}.ff", f"blocks.{piece}", num_bytes, *copy, *wait, run_end_ms
    )


def test_text_names_the_model_the_cap_the_step_and_the_stall(report):
    text = str(report)
    for part in (
        "FluxTransformer2DModel on cuda:0: ready, 20 steps",
        "10.00 GiB",
        "300.0 ms",
        "130.0 ms",
    ):
        assert part in text


def test_text_has_no_colour_codes_when_stdout_is_no_terminal(report, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False, raising=False)
    assert "\x1b" not in str(report)


def test_text_fits_a_hundred_columns_without_trailing_space(report):
    lines = str(report).splitlines()
    assert max(map(len, lines)) <= 100
    assert all(line == line.rstrip() for line in lines)


def test_notes_with_brackets_are_shown_as_they_are(report):
    assert "blocks.3.attn [whole]: its processor" in str(report)


def test_worst_blocks_come_first_and_the_rest_are_summed(report):
    text = str(report)
    assert text.index("blocks.11 ") < text.index("blocks.10 ") < text.index("blocks.4 ")
    assert "3 other blocks" in text
    assert "6.0 ms" in text  # blocks 1 to 3


def test_stalls_may_be_plain_tuples(report):
    plain = dataclasses.replace(report, stalls=(("blocks.0", 2.5, MIB, 50.0),))
    assert "2.5 ms" in str(plain)
    assert plain.to_dict()["stalls"] == [
        {"block": "blocks.0", "stall_ms": 2.5, "bytes": MIB, "gb_per_s": 50.0}
    ]


def test_what_is_not_known_is_said_to_be_so(report):
    unknown = ("step_ms", "stall_ms", "overlap", "link_gb_per_s", "activation_bytes", "bound_ms")
    young = dataclasses.replace(report, steps=0, stalls=(), **dict.fromkeys(unknown))
    text = str(young)
    assert text.count("not known yet") == 2
    assert young.advice == ""
    assert young.bound_share is None


def test_json_holds_every_field_and_survives_a_round_trip(report):
    read = json.loads(report.to_json())
    assert {field.name for field in dataclasses.fields(report)} <= set(read)
    assert read["streamed_bytes"] == 14 * GIB
    assert read["bound_share"] == pytest.approx(0.95)


def test_advice_says_that_the_link_is_the_limit_and_what_a_gib_saves(report):
    assert "link is the limit" in report.advice
    assert "saves up to 19.5 ms" in report.advice


def test_advice_says_that_a_lower_cap_is_free_when_copies_are_hidden(report):
    hidden = dataclasses.replace(report, stall_ms=1.0)
    assert "lower cap" in hidden.advice


def test_advice_says_that_the_ring_is_too_small_when_the_link_idles(report):
    idle = dataclasses.replace(report, streamed_bytes=2 * GIB)
    assert "link idles" in idle.advice


def test_a_throttled_link_counts_as_slow_as_it_was_made(report):
    slow = dataclasses.replace(report, streamed_bytes=2 * GIB, throttle_gb_per_s=8.0)
    assert "link is the limit" in slow.advice


def test_timeline_sums_stalls_and_streamed_bytes():
    timeline = Timeline(
        step_ms=10.0,
        spans=(
            span(0, copy=(-2.0, 1.0), wait=(0.0, 1.0), run_end_ms=3.0, num_bytes=5),
            span(1, wait=(3.0, 3.0), run_end_ms=5.0, num_bytes=7),
            span(2, copy=(1.0, 5.5), wait=(5.0, 5.5), run_end_ms=10.0, num_bytes=11),
        ),
    )
    assert timeline.stall_ms == pytest.approx(1.5)
    assert timeline.streamed_bytes == 16  # the resident piece does not count
    assert timeline.link_busy_ms == pytest.approx(7.5)


def test_copies_on_two_streams_at_once_keep_the_link_busy_only_once():
    spans = (span(0, copy=(0.0, 4.0)), span(1, copy=(1.0, 3.0)), span(2, copy=(2.0, 6.0)))
    assert Timeline(10.0, spans).link_busy_ms == pytest.approx(6.0)
