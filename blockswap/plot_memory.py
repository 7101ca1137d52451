"""The picture of memory over one step: what stands on the device, and how the ring turns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from blockswap.plot import RESIDENT_GREY, STALL_RED, save_figure, spread
from blockswap.report import Report, Timeline
from blockswap.ring_use import RingUse, mean_held_bytes, ring_use
from blockswap.sizes import format_bytes

IN_USE_BLUE, READY_BLUE, FILLING_BLUE = "#1f5f99", "#6faee0", "#cfe3f5"
FIXED_GREY = "#8796a5"
ACTIVATION_SAND = "#f4ecd8"
_LABEL_SHARE = 0.055  # of the upper panel's height, per label
_STALL_SHARE = 0.07  # of the lower panel's, for the stalls under the ring


class _Layer(NamedTuple):
    """Something that stands on the device throughout the step."""

    name: str
    bytes: int
    color: str


def plot_memory(
    timeline: Timeline, report: Report, path: str | Path, title: str = "one step"
) -> None:
    """Draws what blockswap holds on the device over one step and, enlarged, what its ring does.

    Above, from the bottom: fixed weights, residents, the ring, activations at their peak, and the
    cap. Below: the ring's bytes by their state, and in red when compute waits for a copy.

    Args:
        timeline: the step; times in ms.
        report: of the same session; sizes in bytes.
        path: the picture; its suffix chooses the format (.png, .svg, .pdf).
        title: what ran, in a few words.
    """
    uses = [use for use in ring_use(timeline, report.ring_bytes) if use.begin_ms >= 0]
    figure = Figure(figsize=(13, 7.2), layout="constrained")
    device, ring = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    _draw_device(device, report, uses)
    _draw_ring(ring, report, uses, timeline)
    ring.set_xlim(0, timeline.step_ms)
    ring.set_xlabel("ms from the start of the step")
    for axes in (device, ring):
        axes.spines[["top", "right"]].set_visible(False)
    device.set_title(f"{title}\n", loc="left", fontsize=13, fontweight="bold")
    device.text(0, 1.02, _caption(report, uses), transform=device.transAxes, fontsize=10.5)
    ring.legend(
        handles=_legend(timeline),
        frameon=False,
        fontsize=9.5,
        handlelength=1.2,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.2),
        ncols=8,
    )
    save_figure(figure, path)


def _draw_device(axes: Axes, report: Report, uses: Sequence[RingUse]) -> None:
    """All that stands on the device, as one stack; its parts are named at the right."""
    # PyTorch's share holds the fixed weights, too.
    activation_bytes = max(0, (report.activation_bytes or 0) - report.fixed_bytes)
    below = (
        _Layer("fixed weights", report.fixed_bytes, FIXED_GREY),
        _Layer("residents", report.resident_bytes, RESIDENT_GREY),
    )
    ring_from_bytes = sum(layer.bytes for layer in below)
    above = _Layer("activations, peak", activation_bytes, ACTIVATION_SAND)
    weight_bytes = ring_from_bytes + report.ring_bytes
    top_bytes = max(weight_bytes + activation_bytes, report.cap_bytes or 0)
    unit_bytes, unit = _unit_of(top_bytes)

    labels = _add_layers(axes, below, 0, unit_bytes)
    _add_ring(axes, uses, ring_from_bytes, unit_bytes)
    middle = (ring_from_bytes + report.ring_bytes / 2) / unit_bytes
    labels.append((middle, f"ring {format_bytes(report.ring_bytes)}, enlarged below"))
    axes.axhline(weight_bytes / unit_bytes, color="black", linewidth=1)
    labels += _add_layers(axes, [above], weight_bytes, unit_bytes)
    if report.cap_bytes is not None:
        cap = report.cap_bytes / unit_bytes
        axes.axhline(cap, color="black", linewidth=2, linestyle="--")
        labels.append((cap, f"cap {format_bytes(report.cap_bytes)}"))
    height = 1.05 * top_bytes / unit_bytes
    axes.set_ylim(0, height)
    axes.set_ylabel(f"on the device, {unit}")
    _name_at_the_right(axes, labels, height)


def _draw_ring(axes: Axes, report: Report, uses: Sequence[RingUse], timeline: Timeline) -> None:
    """The ring alone, and under it the stalls."""
    unit_bytes, unit = _unit_of(report.ring_bytes)
    size = max(1, report.ring_bytes) / unit_bytes
    _add_ring(axes, uses, 0, unit_bytes)
    axes.axhline(size, color="black", linewidth=1)
    axes.axhline(0, color="black", linewidth=0.6)
    stalls = [(span.wait_begin_ms, span.stall_ms) for span in timeline.spans]
    lane = (-1.4 * _STALL_SHARE * size, _STALL_SHARE * size)
    axes.broken_barh(stalls, lane, facecolor=STALL_RED, edgecolor="none", linewidth=0)
    axes.set_ylim(-1.6 * _STALL_SHARE * size, 1.05 * size)
    axes.set_ylabel(f"in the ring, {unit}")
    labels = [(size, f"ring {format_bytes(report.ring_bytes)}")]
    _name_at_the_right(axes, labels, size)


def _add_layers(
    axes: Axes, layers: Iterable[_Layer], base_bytes: int, unit_bytes: int
) -> list[tuple[float, str]]:
    """Draws layers from `base_bytes` upwards; their middles and names, without empty ones."""
    labels = []
    for layer in layers:
        if layer.bytes > 0:
            low, high = base_bytes / unit_bytes, (base_bytes + layer.bytes) / unit_bytes
            axes.axhspan(low, high, color=layer.color, linewidth=0)
            labels.append(((low + high) / 2, f"{layer.name} {format_bytes(layer.bytes)}"))
        base_bytes += layer.bytes
    return labels


def _add_ring(axes: Axes, uses: Sequence[RingUse], base_bytes: int, unit_bytes: int) -> None:
    """The ring's states from `base_bytes` upwards: in use, ready, filling; white is free."""
    xs = [use.begin_ms for use in uses]
    low = [base_bytes / unit_bytes for _ in uses]
    for state, color in (
        ([use.in_use_bytes for use in uses], IN_USE_BLUE),
        ([use.ready_bytes for use in uses], READY_BLUE),
        ([use.filling_bytes for use in uses], FILLING_BLUE),
    ):
        high = [y + num_bytes / unit_bytes for y, num_bytes in zip(low, state, strict=True)]
        axes.fill_between(xs, low, high, step="post", color=color, linewidth=0)
        low = high


def _name_at_the_right(axes: Axes, labels: list[tuple[float, str]], height: float) -> None:
    """Writes each label beside its place; where places are close, one above the other."""
    size = _LABEL_SHARE * height
    places = spread([y - size / 2 for y, _ in labels], [size] * len(labels), 0.0, height)
    across = axes.get_yaxis_transform()  # x in shares of the panel, y in its data
    for (y, text), begin in zip(labels, places, strict=True):
        middle = begin + size / 2
        ends = [1.002, 1.014], [y, middle]
        axes.plot(*ends, color="black", linewidth=0.8, transform=across, clip_on=False)
        axes.text(1.018, middle, text, fontsize=10, va="center", transform=across)


def _caption(report: Report, uses: Sequence[RingUse]) -> str:
    """What one reads first: how much stands on the device, and what passes through the ring."""
    held_bytes = report.fixed_bytes + report.resident_bytes + report.ring_bytes
    weights = f"{format_bytes(held_bytes)} of {format_bytes(report.weight_bytes)}"
    parts = [f"{weights} of weights on the device"]
    if report.ring_bytes > 0:
        streamed = format_bytes(report.streamed_bytes)
        laps = report.streamed_bytes / report.ring_bytes
        parts.append(f"{streamed} pass through the ring, {laps:.1f} times its size")
        filled = mean_held_bytes(uses) / report.ring_bytes
        parts.append(f"{filled:.0%} of it filled on average")
    return "   |   ".join(parts)


def _legend(timeline: Timeline) -> list[Patch]:
    handles = [
        Patch(color=IN_USE_BLUE, label="in use by compute"),
        Patch(color=READY_BLUE, label="ready: fetched, waits for its turn"),
        Patch(color=FILLING_BLUE, label="filling: its copy runs"),
        Patch(facecolor="white", edgecolor="black", linewidth=0.8, label="free"),
    ]
    if timeline.stall_ms > 0:
        handles.append(Patch(color=STALL_RED, label="stall: compute waits for a copy"))
    return handles


def _unit_of(num_bytes: int) -> tuple[int, str]:
    """The unit in which a scale up to `num_bytes` reads well."""
    return (2**30, "GiB") if num_bytes >= 2**30 else (2**20, "MiB")
