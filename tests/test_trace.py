"""The trace of a step: it keeps the rules of the trace-event format and tells what was measured."""

import dataclasses
import json
import math
from collections import defaultdict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ring_steps import Piece, any_steps, run_steps
from session_models import attach_ready, make_input, make_stack

from blockswap.report import PieceSpan, Timeline

MIB = 2**20
COUNTER = "weights on the device"


def check_format(trace):
    """Raises AssertionError where viewers would drop or misplace an event."""
    trace = json.loads(json.dumps(trace, allow_nan=False))
    events = trace["traceEvents"]
    metadata = [event for event in events if event["ph"] == "M"]
    timed = [event for event in events if event["ph"] != "M"]
    assert events == [*metadata, *timed]
    assert {event["pid"] for event in events} == {1}
    assert {event["ph"] for event in events} <= set("MXCsf")
    assert {event["name"] for event in metadata} == {
        "process_name", "thread_name", "thread_sort_index",
    }  # fmt: skip
    times = [event["ts"] for event in timed]
    assert times == sorted(times)
    assert times[0] == 0
    named = {event["tid"] for event in metadata if event["name"] == "thread_name"}
    assert {event["tid"] for event in timed if event["ph"] != "C"} <= named
    check_slices([event for event in timed if event["ph"] == "X"])
    check_flows(timed)
    for event in timed:
        if event["ph"] == "C":
            assert event["args"] and all(type(value) is int for value in event["args"].values())


def ns(us):
    return round(1e3 * us)


def check_slices(slices):
    end_ns = defaultdict(int)
    for event in slices:
        assert isinstance(event["name"], str) and event["name"]
        assert math.isfinite(event["dur"]) and event["dur"] >= 0
        assert ns(event["ts"]) >= end_ns[event["tid"]], f"overlaps on its track: {event}"
        end_ns[event["tid"]] = ns(event["ts"]) + ns(event["dur"])


def check_flows(timed):
    """Both ends of each flow exist, in order, and each stands in a slice that came before it."""
    ends = defaultdict(list)
    newest = {}
    for event in timed:
        if event["ph"] == "X":
            newest[event["tid"]] = event
        elif event["ph"] in "sf":
            ends[event["cat"], event["name"], event["id"]].append(event)
            slice_ = newest[event["tid"]]
            assert slice_["ts"] <= event["ts"]
            assert ns(event["ts"]) <= ns(slice_["ts"]) + ns(slice_["dur"])
            assert slice_["args"]["piece"] == event["id"]
    for of_flow in ends.values():
        assert [event["ph"] for event in of_flow] == ["s", "f"]
        assert of_flow[1]["bp"] == "e"


def tracks_of(trace):
    """Slices by the name of their track."""
    names = {
        event["tid"]: event["args"]["name"]
        for event in trace["traceEvents"]
        if event["name"] == "thread_name"
    }
    tracks = {name: [] for name in names.values()}
    for event in trace["traceEvents"]:
        if event["ph"] == "X":
            tracks[names[event["tid"]]].append(event)
    return tracks


def counter_of(trace):
    return [event["args"]["bytes"] for event in trace["traceEvents"] if event["name"] == COUNTER]


@pytest.fixture
def timeline():
    """One piece fetched in the step before, one that compute waits for, one resident."""
    spans = (
        PieceSpan(4, "blocks.0.ff", "blocks.0", 66 * MIB, -2.0, -0.5, 1.0, 1.0, 3.0),
        PieceSpan(5, "blocks.0.out", "blocks.0", 50 * MIB, 2.0, 4.0, 3.0, 4.0, 6.0),
        PieceSpan(6, "blocks.1.ff", "blocks.1", 8 * MIB, 0.0, 0.0, 6.0, 6.0, 7.0),
    )
    return Timeline(9.0, spans, fixed_bytes=3, resident_bytes=70, ring_bytes=128 * MIB)


@given(any_steps(max_pause_ms=30, max_links=3))
def test_every_step_makes_a_trace_that_keeps_the_rules_of_the_format(steps):
    for timeline in steps.timelines:
        check_format(timeline.to_trace())


@given(any_steps(max_pause_ms=30, max_links=3), st.sampled_from([1 / 3, 1 / 3e3, 1 / 3e6]))
def test_times_that_are_no_whole_nanoseconds_keep_the_rules_too(steps, part):
    for timeline in steps.timelines[-2:]:
        spans = [
            dataclasses.replace(
                span,
                **{
                    field.name: getattr(span, field.name) * part
                    for field in dataclasses.fields(span)
                    if field.name.endswith("_ms")
                },
            )
            for span in timeline.spans
        ]
        check_format(Timeline(timeline.step_ms * part, tuple(spans)).to_trace())


def test_a_step_without_copies_is_a_trace_too():
    trace = Timeline(12.0, ()).to_trace()
    check_format(trace)
    assert [event["name"] for event in tracks_of(trace)["compute"]] == ["resident weights"]


def test_the_tracks_are_named_and_the_process_is_blockswap(timeline):
    trace = timeline.to_trace()
    assert list(tracks_of(trace)) == ["step", "copies (link)", "compute", "stalls"]
    named = [e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "process_name"]
    assert named == ["blockswap"]


def test_the_trace_begins_with_the_first_copy_and_the_step_follows(timeline):
    tracks = tracks_of(timeline.to_trace())
    (step,) = tracks["step"]
    assert (step["ts"], step["dur"]) == (2000.0, 9000.0)
    assert [(e["ts"], e["dur"]) for e in tracks["copies (link)"]] == [(0, 1500.0), (4000.0, 2000.0)]


def test_compute_shows_runs_and_what_ran_from_residents_but_not_its_stalls(timeline):
    tracks = tracks_of(timeline.to_trace())
    assert [(e["name"], e["ts"] - 2000, e["dur"]) for e in tracks["compute"]] == [
        ("resident weights", 0, 1000),
        ("blocks.0.ff", 1000, 2000),
        ("blocks.0.out", 4000, 2000),
        ("blocks.1.ff", 6000, 1000),
        ("resident weights", 7000, 2000),
    ]
    (stall,) = tracks["stalls"]
    assert (stall["name"], stall["ts"] - 2000, stall["dur"]) == (
        "wait for blocks.0.out",
        3000,
        1000,
    )


def test_a_gap_between_two_launches_is_not_called_a_run():
    spans = tuple(
        PieceSpan(i, "ff", "blocks.0", 1, -2.0 + i, -1.0 + i, at_ms, at_ms, at_ms + 0.99)
        for i, at_ms in enumerate((0.0, 1.0))
    )
    tracks = tracks_of(Timeline(1.99, spans).to_trace())
    assert [event["name"] for event in tracks["compute"]] == ["ff", "ff"]


def test_the_microseconds_between_two_events_are_not_called_a_stall(timeline):
    ready = dataclasses.replace(timeline.spans[1], copy_end_ms=3.0, wait_end_ms=3.002)
    trace = dataclasses.replace(timeline, spans=(ready,)).to_trace()
    assert tracks_of(trace)["stalls"] == []


def test_each_event_of_a_piece_tells_its_number_block_bytes_speed_and_stall(timeline):
    tracks = tracks_of(timeline.to_trace())
    expected = {
        "piece": 5,
        "block": "blocks.0",
        "bytes": 50 * MIB,
        "gb_per_s": 26.21,
        "stall_ms": 1,
    }
    assert tracks["copies (link)"][1]["args"] == expected
    assert tracks["compute"][2]["args"] == expected
    assert tracks["stalls"][0]["args"] == expected


def test_an_arrow_leads_from_each_copy_to_the_run_that_used_it(timeline):
    flows = [e for e in timeline.to_trace()["traceEvents"] if e["ph"] in "sf"]
    assert [(e["ph"], e["id"], e["ts"]) for e in flows] == [
        ("s", 4, 0), ("f", 4, 3000), ("s", 5, 4000), ("f", 5, 6000),
    ]  # fmt: skip


def test_pieces_that_took_no_time_at_all_keep_arrows_of_their_own():
    spans = tuple(
        PieceSpan(index, "ff", "blocks.0", 1, 0.0, 1e-9, 2.0, 2.0, 2.0) for index in range(3)
    )
    check_format(Timeline(9.0, spans).to_trace())


def test_a_resident_piece_runs_without_a_copy_or_an_arrow(timeline):
    trace = timeline.to_trace()
    about = [e for e in trace["traceEvents"] if e.get("args", {}).get("piece") == 6]
    assert [event["ph"] for event in about] == ["X"]
    assert "gb_per_s" not in about[0]["args"]


def test_the_counter_adds_what_the_ring_holds_to_what_always_stands_there(timeline):
    events = [e for e in timeline.to_trace()["traceEvents"] if e["ph"] == "C"]
    held = {e["ts"] / 1e3 - 2: e["args"]["bytes"] - 73 for e in events}
    assert held[-2.0] == 66 * MIB
    assert held[2.0] == 116 * MIB
    assert held[3.0] == 50 * MIB
    assert held[6.0] == 0
    assert held[7.0] == held[9.0] == 66 * MIB  # fetched for the next step


@given(any_steps(max_pause_ms=30, max_links=3))
def test_the_counter_never_leaves_what_the_plan_allows(steps):
    for timeline in steps.timelines:
        constant = timeline.fixed_bytes + timeline.resident_bytes
        counted = counter_of(timeline.to_trace())
        assert constant <= min(counted) <= max(counted) <= constant + timeline.ring_bytes


def test_copies_that_run_at_once_stand_in_tracks_of_their_own():
    steps = run_steps([Piece(10, 4, 1)] * 6, ring_bytes=40, num_links=2)
    trace = steps.timelines[-1].to_trace()
    check_format(trace)
    tracks = tracks_of(trace)
    lanes = [tracks[name] for name in ("copies (link)", "copies (link) 2")]
    assert min(len(lane) for lane in lanes) > 1
    assert sum(len(lane) for lane in lanes) == 6


def test_a_trace_is_saved_as_json(tmp_path, timeline):
    timeline.save_trace(tmp_path / "trace.json")
    timeline.save_trace(str(tmp_path / "again.json"))
    assert json.loads((tmp_path / "trace.json").read_text()) == timeline.to_trace()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.json", "trace.json"]


def test_a_trace_that_cannot_be_written_leaves_the_older_one(tmp_path, timeline, monkeypatch):
    timeline.save_trace(tmp_path / "trace.json")
    older = (tmp_path / "trace.json").read_bytes()
    write_text = Path.write_text

    def write_half(self, text, *arguments):
        write_text(self, text[: len(text) // 2], *arguments)
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_text", write_half)
    with pytest.raises(OSError, match="no space"):
        timeline.save_trace(tmp_path / "trace.json")
    assert (tmp_path / "trace.json").read_bytes() == older
    assert [path.name for path in tmp_path.iterdir()] == ["trace.json"]


def test_a_real_session_tells_the_same_bytes_in_trace_and_report():
    session = attach_ready(make_stack(), make_input(), offload="3000KiB")
    timeline, report = session.timeline(), session.report()
    trace = timeline.to_trace()
    check_format(trace)
    names = ("fixed_bytes", "resident_bytes", "ring_bytes")
    assert all(getattr(timeline, name) == getattr(report, name) > 0 for name in names)
    copies = tracks_of(trace)["copies (link)"]
    assert sum(event["args"]["bytes"] for event in copies) == report.streamed_bytes
    assert len(copies) == report.copies_per_step
    constant = report.fixed_bytes + report.resident_bytes
    assert constant < max(counter_of(trace)) <= constant + report.ring_bytes
