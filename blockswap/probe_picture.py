"""The picture of a probe: GB/s over the size of one copy, one line per link."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from blockswap.probe import HOST, Link, Probe, Row, short_bytes
from blockswap.probe_text import best_gb_per_s

_MARKERS = "os^Dvp*X"  # one per device
_LINKS_PER_COLUMN = 20


def draw(probe: Probe, path: Path) -> None:
    """Draw all rows that were measured, both axes logarithmic.

    Args:
        probe: what was measured.
        path: the picture; its suffix chooses the format (.png, .svg, .pdf).
    """
    links = {link: rows for link, rows in probe.by_link().items() if best_gb_per_s(rows)}
    num_columns = -(-len(links) // _LINKS_PER_COLUMN)
    figure = Figure(figsize=(7.5 + 2.3 * num_columns, 4.8), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    devices = [device.id for device in probe.devices]
    # The legend names the fastest link first, as the lines lie.
    for link in sorted(links, key=lambda link: -(best_gb_per_s(links[link]) or 0)):
        _draw_link(axes, link, links[link], devices)
    axes.set_xticks(probe.chunk_bytes(), [short_bytes(size) for size in probe.chunk_bytes()])
    axes.xaxis.set_minor_locator(NullLocator())
    low, high = axes.get_ylim()
    axes.set_ylim(low / 1.5, high * 1.5)  # one link alone must not fill the scale
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("size of one copy")
    axes.set_ylabel("GB/s (10^9 bytes)")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    names = dict.fromkeys(d.name for d in probe.devices if d.id != HOST or len(devices) == 1)
    axes.set_title(f"{', '.join(names)}, {probe.date}", loc="left", fontweight="bold")
    if links:
        beside = {"loc": "center left", "bbox_to_anchor": (1.01, 0.5), "ncols": num_columns}
        axes.legend(frameon=False, fontsize=9, handlelength=3, **beside)
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=130, facecolor="white")


def _draw_link(axes: Axes, link: Link, rows: Sequence[Row], devices: Sequence[str]) -> None:
    """Kind of link by colour, direction by dashes, device by mark."""
    measured = [(row.chunk_bytes, row.gb_per_s) for row in rows if row.gb_per_s]
    end = link.target if link.source == HOST else link.source
    axes.plot(
        [chunk_bytes for chunk_bytes, _ in measured],
        [gb_per_s for _, gb_per_s in measured],
        color=_color(link),
        linestyle="--" if link.target == HOST and not link.is_memory else "-",
        marker=_MARKERS[devices.index(end) % len(_MARKERS)],
        markersize=5,
        linewidth=1.6,
        label=link.label,
    )


def _color(link: Link) -> str:
    if link.host_memory is not None:
        return "#1f6fb4" if link.host_memory == "pinned" else "#e08a1e"
    if link.is_peer:
        return "#7a57a8"
    return "#8d6e4b" if link.source == HOST else "#2b8a57"
