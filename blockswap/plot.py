"""One step as a picture: copies above, compute below.

Drawn with matplotlib's Agg canvas: no display, no global state (`pyplot` is never imported).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from blockswap.report import PieceSpan, Report, Timeline
from blockswap.sizes import format_bytes

STALL_RED = "#e00000"  # nothing else in a picture is red
RESIDENT_GREY = "#c9d3dc"
_NEXT_STEP_GREY = "#d9d9d9"
HUES = (  # two tints per list of blocks: neighbours can be told apart
    ("#1f6fb4", "#6faee0"),
    ("#e08a1e", "#f4bf73"),
    ("#2b8a57", "#7cc79d"),
    ("#7a57a8", "#b39bd3"),
    ("#00838f", "#66bcc4"),
    ("#8d6e4b", "#c2a987"),
)
_LINK_Y, _COMPUTE_Y, _LANE_HEIGHT = 1.25, 0.25, 0.6
_MAX_LABELS = 3
# What was fetched longer before the step, as shares of it, is told in words: it would leave too
# little width to the step itself.
_MOST_AHEAD = 0.2

Box = tuple[float, float]


def plot_timeline(
    timeline: Timeline, path: str | Path, title: str = "one step", report: Report | None = None
) -> None:
    """Draws one step: copies on the link above, compute below, stalls in red, all to scale.

    What the step before had fetched ahead lies left of 0 on a shaded ground, as far as there is
    room; the same work for the next step is drawn pale at the right, since the link is not idle
    then.

    Args:
        timeline: the step; times in ms.
        path: the picture; its suffix chooses the format (.png, .svg, .pdf).
        title: what ran, in a few words.
        report: adds the predicted time and the bound to the caption.
    """
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    axes = figure.add_subplot()
    copies = [(s.copy_begin_ms, s.copy_end_ms) for s in timeline.spans if s.copy_ms > 0]
    most_ms = -_MOST_AHEAD * timeline.step_ms
    begin_ms = min([0.0, *(max(begin, most_ms) for begin, end in copies if end > most_ms)])
    hues = _hue_of_list(timeline.spans)
    if begin_ms < 0:
        axes.axvspan(begin_ms * 1.02, 0, color="#f1f1ea", zorder=0)
    _draw_link(axes, timeline, hues)
    _draw_compute(axes, timeline, hues)
    margin_ms = 0.01 * (timeline.step_ms - begin_ms)
    view_ms = (begin_ms - margin_ms, timeline.step_ms + margin_ms)
    _label_worst_stalls(axes, timeline, view_ms)
    if earlier_ms := [begin for begin, _ in copies if begin < begin_ms]:
        _label_earlier_copies(axes, earlier_ms, begin_ms)
    for x in (0.0, timeline.step_ms):
        axes.axvline(x, color="black", linewidth=1, zorder=5)
    axes.set_xlim(*view_ms)
    axes.set_ylim(-0.25, 2.05)
    middles = [_LINK_Y + _LANE_HEIGHT / 2, _COMPUTE_Y + _LANE_HEIGHT / 2]
    axes.set_yticks(middles, ["link\n(copies)", "compute\n(runs)"], fontsize=11)
    axes.set_xlabel("ms from the start of the step")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.set_title(f"{title}\n", loc="left", fontsize=13, fontweight="bold")
    axes.text(0, 1.02, _caption(timeline, report), transform=axes.transAxes, fontsize=10.5)
    axes.legend(
        handles=_legend(timeline, hues, begin_ms),
        frameon=False,
        fontsize=9.5,
        handlelength=1.2,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.16),
        ncols=8,
    )
    save_figure(figure, path)


def _draw_link(axes: Axes, timeline: Timeline, hues: Mapping[str, int]) -> None:
    """Copies for this step in colour, what the link fetches for the next step in grey."""
    # In a steady cycle the next step's fetches stand where this step's stood.
    ahead = [
        (span.copy_begin_ms + timeline.step_ms, min(span.copy_end_ms, 0.0) + timeline.step_ms)
        for span in timeline.spans
        if span.copy_ms > 0 and span.copy_begin_ms < 0
    ]
    _add_boxes(axes, ahead, _LINK_Y, _NEXT_STEP_GREY, hatch="////")
    for tint, spans in _spans_by_tint(timeline, hues).items():
        _add_boxes(axes, [(s.copy_begin_ms, s.copy_end_ms) for s in spans], _LINK_Y, tint)


def _draw_compute(axes: Axes, timeline: Timeline, hues: Mapping[str, int]) -> None:
    """Runs of streamed pieces in colour over the grey of residents; stalls in red, on top."""
    _add_boxes(axes, [(0.0, timeline.step_ms)], _COMPUTE_Y, RESIDENT_GREY)
    for tint, spans in _spans_by_tint(timeline, hues).items():
        _add_boxes(axes, [(s.wait_end_ms, s.run_end_ms) for s in spans], _COMPUTE_Y, tint)
    stalls = [(s.wait_begin_ms, s.wait_end_ms) for s in timeline.spans]
    _add_boxes(axes, stalls, _COMPUTE_Y - 0.06, STALL_RED, height=_LANE_HEIGHT + 0.12, zorder=4)


def _spans_by_tint(timeline: Timeline, hues: Mapping[str, int]) -> dict[str, list[PieceSpan]]:
    """Streamed pieces by colour: a hue per list of blocks, its two tints in turn."""
    by_tint: dict[str, list[PieceSpan]] = {}
    for index, span in enumerate(span for span in timeline.spans if span.copy_ms > 0):
        by_tint.setdefault(HUES[hues[_list_of(span)]][index % 2], []).append(span)
    return by_tint


def _label_worst_stalls(axes: Axes, timeline: Timeline, view_ms: Box) -> None:
    """Names the longest stalls in a row under the lane, each tied to the copy it waited for."""
    worst: dict[str, PieceSpan] = {}  # one per block
    for span in sorted(timeline.spans, key=lambda span: -span.stall_ms):
        if span.stall_ms > 0.004 * timeline.step_ms and len(worst) < _MAX_LABELS:
            worst.setdefault(span.block or span.name, span)
    spans = sorted(worst.values(), key=lambda span: span.wait_begin_ms)
    texts = [f"{span.stall_ms:.1f} ms for {_shorten(span.block or span.name)}" for span in spans]
    view_begin_ms, view_end_ms = view_ms
    char_ms = 0.0062 * (view_end_ms - view_begin_ms)
    wanted_ms = [(span.wait_begin_ms + span.wait_end_ms) / 2 for span in spans]
    widths_ms = [len(text) * char_ms for text in texts]
    lefts_ms = spread(wanted_ms, widths_ms, view_begin_ms, view_end_ms)
    for span, text, middle_ms, left_ms in zip(spans, texts, wanted_ms, lefts_ms, strict=True):
        xs = [span.copy_end_ms, span.wait_end_ms]
        ys = [_LINK_Y, _COMPUTE_Y + _LANE_HEIGHT + 0.06]
        axes.plot(xs, ys, color=STALL_RED, linewidth=1.2, zorder=4)
        xs, ys = [middle_ms, left_ms + 2 * char_ms], [_COMPUTE_Y - 0.06, _COMPUTE_Y - 0.22]
        axes.plot(xs, ys, color=STALL_RED, linewidth=0.8, zorder=4)
        axes.text(left_ms, _COMPUTE_Y - 0.33, text, color=STALL_RED, fontsize=9, va="center")


def _label_earlier_copies(axes: Axes, earlier_ms: Sequence[float], begin_ms: float) -> None:
    """Says above the link what began left of the view, and how early."""
    copies = "1 copy" if len(earlier_ms) == 1 else f"{len(earlier_ms)} copies"
    text = f" ← {copies} began earlier, from {min(earlier_ms):.0f} ms on"
    axes.text(begin_ms, _LINK_Y + _LANE_HEIGHT + 0.1, text, fontsize=9, va="center")


def spread(
    wanted: Sequence[float], sizes: Sequence[float], begin: float, end: float
) -> list[float]:
    """Begins of labels in one row or column, each near its wanted place, none over another."""
    begins: list[float] = []
    free = begin
    for place, size in zip(wanted, sizes, strict=True):
        begins.append(max(place, free))
        free = begins[-1] + size
    for index in reversed(range(len(begins))):
        begins[index] = min(begins[index], end - sizes[index])
        end = begins[index]
    return begins


def _shorten(name: str) -> str:
    """The name, its middle left out where it is long: both its list and its number stay."""
    return name if len(name) <= 34 else f"{name[:15]}…{name[-18:]}"


def _add_boxes(
    axes: Axes,
    boxes: Iterable[Box],
    y: float,
    color: str,
    height: float = _LANE_HEIGHT,
    zorder: float = 2,
    hatch: str | None = None,
) -> None:
    """All boxes of one colour as one artist: hundreds of pieces stay fast. No edges: to scale."""
    widths = [(begin, end - begin) for begin, end in boxes if end > begin]
    edge = "white" if hatch else "none"
    lane = (y, height)
    axes.broken_barh(
        widths, lane, facecolor=color, edgecolor=edge, linewidth=0, hatch=hatch, zorder=zorder
    )


def _list_of(span: PieceSpan) -> str:
    return (span.block or span.name).split(".")[0]


def _hue_of_list(spans: Sequence[PieceSpan]) -> dict[str, int]:
    """Index into the hues per list of blocks, in order of first use."""
    lists = dict.fromkeys(_list_of(span) for span in spans)
    return {name: index % len(HUES) for index, name in enumerate(lists)}


def _caption(timeline: Timeline, report: Report | None) -> str:
    """Step, stall, link: what one reads first."""
    step_ms, busy_ms = timeline.step_ms, timeline.link_busy_ms
    parts = [f"step {step_ms:.1f} ms"]
    if report is not None and report.bound_ms is not None:
        parts[0] += f" (bound {report.bound_ms:.1f})"
    parts.append(f"stall {timeline.stall_ms:.1f} ms ({timeline.stall_ms / step_ms:.0%})")
    if busy_ms > 0:
        gb_per_s = timeline.streamed_bytes / busy_ms / 1e6
        parts.append(f"link busy {min(1.0, busy_ms / step_ms):.0%}")
        parts.append(f"{format_bytes(timeline.streamed_bytes)} at {gb_per_s:.1f} GB/s")
    else:
        parts.append("nothing streamed")
    return "   |   ".join(parts)


def _legend(timeline: Timeline, hues: Mapping[str, int], begin_ms: float) -> list[Patch]:
    streamed = {_list_of(span) for span in timeline.spans if span.copy_ms > 0}
    handles = [
        Patch(color=HUES[hue][0], label=name) for name, hue in hues.items() if name in streamed
    ]
    handles.append(Patch(color=RESIDENT_GREY, label="runs from resident weights"))
    if begin_ms < 0:
        label = "fetched for the next step"
        handles.append(
            Patch(facecolor=_NEXT_STEP_GREY, edgecolor="white", hatch="////", label=label)
        )
    if timeline.stall_ms > 0:
        handles.append(Patch(color=STALL_RED, label="stall: compute waits for a copy"))
    return handles


def save_figure(figure: Figure, path: str | Path) -> None:
    """Writes a picture; the path's suffix chooses the format."""
    FigureCanvasAgg(figure)
    figure.savefig(Path(path), dpi=130, facecolor="white")
