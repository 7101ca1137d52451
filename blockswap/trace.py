"""One step as a Chrome trace: opens in https://ui.perfetto.dev and in chrome://tracing.

The format is the JSON object form of Chromium's "Trace Event Format". Its unit is the microsecond;
here times are whole nanoseconds until the end, so that events which touch still do after rounding.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blockswap.files import whole_file
from blockswap.ring_use import ring_use

if TYPE_CHECKING:
    from blockswap.report import PieceSpan, Timeline

Event = dict[str, Any]

COPIES, COMPUTE, STALLS = "copies (link)", "compute", "stalls"
COUNTER = "weights on the device"
_PID = 1
_MIN_RESIDENT_NS = 20_000  # less is the gap between two launches, no run
_MIN_STALL_NS = 10_000  # less is what two events take, although nothing had to be waited for


def make_trace(timeline: Timeline) -> Event:
    """Return the step as a JSON object.

    The step's first copies began in the step before. The trace begins with them, at 0; the event
    named "step" shows where the step itself lies.
    """
    streamed = [span for span in timeline.spans if span.copy_ms > 0]
    runs = sorted(timeline.spans, key=lambda span: span.wait_end_ms)
    tracks = {"step": [_step_event(timeline)]}
    for number, lane in enumerate(_lanes(streamed), start=1):
        name = COPIES if number == 1 else f"{COPIES} {number}"
        tracks[name] = [event for span in lane for event in _copy_events(span)]
    tracks[COMPUTE] = [event for span in runs for event in _run_events(span)]
    tracks[COMPUTE] += _resident_events(timeline, runs)
    tracks[STALLS] = [_stall_event(span) for span in runs if _ns(span.stall_ms) >= _MIN_STALL_NS]

    metadata, events = [_name_event("process_name", "blockswap", tid=0)], _counter_events(timeline)
    for tid, (name, of_track) in enumerate(tracks.items(), start=1):
        metadata.append(_name_event("thread_name", name, tid))
        metadata.append(_metadata_event("thread_sort_index", {"sort_index": tid}, tid))
        events += [event | {"tid": tid} for event in of_track]
    # Stable: a flow stays behind the slice that it binds to, also when both begin at one moment.
    events.sort(key=lambda event: event["ts"])
    begin_ns = events[0]["ts"]
    for event in events:
        event["pid"] = _PID
        event["ts"] = (event["ts"] - begin_ns) / 1e3
        if "dur" in event:
            event["dur"] /= 1e3
    return {"traceEvents": [*metadata, *events], "displayTimeUnit": "ms"}


def save_trace(timeline: Timeline, path: str | Path) -> None:
    """Write `make_trace` as JSON. The file appears whole or not at all."""
    with whole_file(Path(path)) as part:
        part.write_text(json.dumps(make_trace(timeline), allow_nan=False) + "\n", "utf-8")


def _step_event(timeline: Timeline) -> Event:
    args = {
        "stall_ms": round(timeline.stall_ms, 3),
        "link_busy_ms": round(timeline.link_busy_ms, 3),
        "streamed_bytes": timeline.streamed_bytes,
    }
    return _slice("step", 0.0, timeline.step_ms, args)


def _copy_events(span: PieceSpan) -> Iterator[Event]:
    """The copy, and the begin of the arrow from it to its run."""
    yield _slice(span.name, span.copy_begin_ms, span.copy_end_ms, _args(span))
    yield _flow("s", span, span.copy_begin_ms)


def _run_events(span: PieceSpan) -> Iterator[Event]:
    yield _slice(span.name, span.wait_end_ms, span.run_end_ms, _args(span))
    if span.copy_ms > 0:
        yield _flow("f", span, span.wait_end_ms) | {"bp": "e"}  # to the slice that encloses it


def _stall_event(span: PieceSpan) -> Event:
    event = _slice(f"wait for {span.name}", span.wait_begin_ms, span.wait_end_ms, _args(span))
    return event | {"cname": "terrible"}  # red in chrome://tracing


def _resident_events(timeline: Timeline, runs: Iterable[PieceSpan]) -> Iterator[Event]:
    """What compute does between the runs of streamed pieces."""
    busy = [(span.wait_begin_ms, span.run_end_ms) for span in runs]
    bounds = [(0.0, 0.0), *busy, (timeline.step_ms, timeline.step_ms)]
    for (_, begin_ms), (end_ms, _) in itertools.pairwise(bounds):
        if _ns(end_ms) - _ns(begin_ms) >= _MIN_RESIDENT_NS:
            yield _slice("resident weights", begin_ms, end_ms, {})


def _counter_events(timeline: Timeline) -> list[Event]:
    constant_bytes = timeline.fixed_bytes + timeline.resident_bytes
    return [
        {
            "ph": "C",
            "name": COUNTER,
            "ts": _ns(use.begin_ms),
            "args": {"bytes": constant_bytes + use.held_bytes},
        }
        for use in ring_use(timeline, timeline.ring_bytes)
    ]


def _lanes(spans: Iterable[PieceSpan]) -> list[list[PieceSpan]]:
    """The copies in as few tracks as copy streams ran at once: events of a track never overlap."""
    lanes: list[list[PieceSpan]] = []
    for span in sorted(spans, key=lambda span: (span.copy_begin_ms, span.copy_end_ms)):
        for lane in lanes:
            if _ns(lane[-1].copy_end_ms) <= _ns(span.copy_begin_ms):
                lane.append(span)
                break
        else:
            lanes.append([span])
    return lanes


def _args(span: PieceSpan) -> Event:
    """What is shown for the piece when one of its events is selected."""
    args: Event = {"piece": span.piece, "block": span.block, "bytes": span.bytes}
    if span.copy_ms > 0:
        args["gb_per_s"] = round(span.bytes / span.copy_ms / 1e6, 2)
    return args | {"stall_ms": round(span.stall_ms, 3)}


def _slice(name: str, begin_ms: float, end_ms: float, args: Event) -> Event:
    begin_ns, end_ns = _ns(begin_ms), _ns(end_ms)
    return {"ph": "X", "name": name, "ts": begin_ns, "dur": end_ns - begin_ns, "args": args}


def _flow(phase: str, span: PieceSpan, ms: float) -> Event:
    return {"ph": phase, "cat": "piece", "name": "copied for", "id": span.piece, "ts": _ns(ms)}


def _name_event(what: str, name: str, tid: int) -> Event:
    return _metadata_event(what, {"name": name}, tid)


def _metadata_event(what: str, args: Event, tid: int) -> Event:
    return {"ph": "M", "name": what, "pid": _PID, "tid": tid, "ts": 0, "args": args}


def _ns(ms: float) -> int:
    return round(1e6 * ms)
