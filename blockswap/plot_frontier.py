"""Step time over memory as a picture: engines, and the floor under all of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from blockswap.plot import HUES, Box, save_figure

_MARKERS = "s^Dvp*X<>"
_MOST_COLUMNS = 2
# Of a label, as shares of the axes.
_LABEL_WIDTH = 0.22
_LABEL_HEIGHT = 0.045


def plot_frontier(rows: Iterable[Mapping[str, Any]], path: str | Path) -> None:
    """Draws step time over memory, one panel per model, one mark per engine, and the frontier.

    The frontier is max(resident_ms, (M_resident - M) / link): no engine that sends raw weights over
    one link can lie below it.

    Args:
        rows: rows of `benchmarks/results/*.json` (design, section 6); those without a time are left
            out.
        path: the picture; its suffix chooses the format.
    """
    usable = [row for row in rows if row.get("step_ms") and row.get("peak_allocated_bytes")]
    by_model: dict[str, list[Mapping[str, Any]]] = {}
    for row in usable:
        by_model.setdefault(str(row["model"]), []).append(row)
    if not by_model:
        raise ValueError("no row has step_ms and peak_allocated_bytes: nothing to draw")
    engines = list(dict.fromkeys(str(row["engine"]) for row in usable))
    columns = min(len(by_model), _MOST_COLUMNS)
    lines = -(-len(by_model) // columns)
    figure = Figure(figsize=(6.2 * columns, 4.8 * lines), layout="constrained")
    for index, (model, model_rows) in enumerate(by_model.items(), start=1):
        axes = figure.add_subplot(lines, columns, index)
        top_ms = _draw_frontier(axes, model_rows)
        far_off: list[_FarOff] = []
        for number, engine in enumerate(engines):
            points = sorted(
                (row["peak_allocated_bytes"] / 2**30, row["step_ms"])
                for row in model_rows
                if row["engine"] == engine
            )
            if points:
                far_off += _draw_engine(axes, engine, number, points, top_ms)
        axes.set_xlim(left=0)
        _draw_far_off(axes, far_off, top_ms)
        axes.set_title(model, loc="left", fontweight="bold")
        axes.set_xlabel("peak memory, GiB")
        axes.set_ylabel("ms per step")
        axes.set_ylim(0, top_ms)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9)
    save_figure(figure, path)


class _FarOff(NamedTuple):
    """A point above the scale."""

    gib: float
    step_ms: float
    color: str
    marker: str


def _draw_engine(
    axes: Axes, engine: str, number: int, points: Sequence[Box], top_ms: float
) -> list[_FarOff]:
    """One engine's points; returns those that are far off the scale."""
    is_ours = engine == "blockswap"
    color = HUES[0][0] if is_ours else HUES[1 + number % (len(HUES) - 1)][0]
    marker = "o" if is_ours else _MARKERS[number % len(_MARKERS)]
    near = [point for point in points if point[1] <= top_ms]
    axes.plot(
        [gib for gib, _ in near],
        [step_ms for _, step_ms in near],
        marker=marker,
        markersize=7 if is_ours else 6,
        linewidth=1.8 if is_ours else 0,
        color=color,
        label=engine,
        zorder=3 if is_ours else 2,
    )
    return [_FarOff(*point, color, marker) for point in points if point not in near]


def _draw_far_off(axes: Axes, points: Iterable[_FarOff], top_ms: float) -> None:
    """They stand at the top edge with their numbers, one under the other where they are close."""
    right = axes.get_xlim()[1]
    rows: list[float] = []  # memory of those that were drawn
    for point in sorted(points, key=lambda point: (-point.step_ms, point.gib)):
        row = sum(abs(other - point.gib) < _LABEL_WIDTH * right for other in rows)
        rows.append(point.gib)
        y = (0.97 - _LABEL_HEIGHT * row) * top_ms
        axes.plot(point.gib, y, marker=point.marker, color=point.color, linewidth=0, clip_on=False)
        is_right = point.gib > (1 - _LABEL_WIDTH) * right
        text = f"{point.step_ms:.0f} ms ↑   " if is_right else f"   {point.step_ms:.0f} ms ↑"
        side = "right" if is_right else "left"
        axes.text(point.gib, y, text, color=point.color, fontsize=9, va="center", ha=side)


def _draw_frontier(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> float:
    """The floor, from the resident runs and the link at its best; returns the scale's top.

    The scale shows the floor and us; an engine several times slower does not flatten the picture.
    """
    ours_ms = [float(row["step_ms"]) for row in rows if row["engine"] == "blockswap"]
    keys = ("resident_ms", "resident_peak_allocated_bytes", "link_gb_per_s")
    known = [row for row in rows if all(row.get(key) for key in keys)]
    if not known:
        return 1.15 * max(float(row["step_ms"]) for row in rows)
    resident_ms, peak_bytes, _ = (min(float(row[key]) for row in known) for key in keys)
    gb_per_s = max(float(row["link_gb_per_s"]) for row in known)
    full_gib, gib_per_ms = peak_bytes / 2**30, gb_per_s * 1e6 / 2**30
    knee_gib = max(0.0, full_gib - resident_ms * gib_per_ms)
    xs = [0.0, knee_gib, full_gib]
    ys = [max(resident_ms, (full_gib - x) / gib_per_ms) for x in xs]
    axes.plot(xs, ys, color="black", linewidth=1.2, linestyle="--", label="frontier", zorder=1)
    axes.fill_between(xs, ys, color="#000000", alpha=0.05, linewidth=0, zorder=0)
    return 1.5 * max([*ours_ms, *ys])
