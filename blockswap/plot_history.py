"""The picture of memory over a pipeline's call: whose turn it is, and what is held meanwhile."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from blockswap.errors import ConfigError
from blockswap.history import MemoryHistory, Moment
from blockswap.plot import RESIDENT_GREY, STALL_RED, save_figure
from blockswap.sizes import format_bytes

TORCH_SAND, PEAK_SAND = "#e3cf9c", "#f4ecd8"
_BANDS = ("#eef3f8", "#dfe8f1")  # behind the parts, in turn
_LEAST_BAND = 0.04  # of the width, for a part's name to be written


class _Band(NamedTuple):
    """Consecutive moments of one part."""

    part: str
    begin: float
    end: float
    times: int


def plot_history(history: MemoryHistory, path: str | Path, title: str) -> None:
    """Draw weights, PyTorch's share and its peaks over time, and the cap.

    Raises:
        ConfigError: nothing was recorded.
    """
    moments = history.moments
    if len(moments) < 2:
        raise ConfigError("nothing was recorded: call the pipeline inside `with session.record()`")
    top = max([moment.reserved_bytes for moment in moments] + [history.cap_bytes or 0, 1])
    unit_bytes, unit = (2**30, "GiB") if top >= 2**30 else (2**20, "MiB")
    figure = Figure(figsize=(13, 5.6), layout="constrained")
    axes = figure.subplots()
    _draw_bands(axes, moments)
    xs = [moment.seconds for moment in moments]
    # What a part held at its peak is known when it ends: it is drawn over the whole part. So are
    # the weights that come when a denoiser begins.
    spans = list(itertools.pairwise(moments))
    peaks = [end.peak_bytes / unit_bytes for _, end in spans]
    caches = [end.reserved_bytes / unit_bytes for _, end in spans]
    pools = [(end if begin.part else begin).pool_bytes / unit_bytes for begin, end in spans]
    held = [
        pool + begin.torch_bytes / unit_bytes for pool, (begin, _) in zip(pools, spans, strict=True)
    ]
    fill: dict[str, Any] = {"fill": True, "linewidth": 0}
    axes.stairs(peaks, xs, color=PEAK_SAND, label="PyTorch, at its peak", **fill)
    if history.cap_bytes is not None and history.peak_bytes > history.cap_bytes:
        cap = history.cap_bytes / unit_bytes
        above = [max(peak, cap) for peak in peaks]
        axes.stairs(above, xs, baseline=cap, color=STALL_RED, label="above the cap", **fill)
    axes.stairs(held, xs, color=TORCH_SAND, label="PyTorch's tensors", **fill)
    axes.stairs(pools, xs, color=RESIDENT_GREY, label="residents, ring, small parameters", **fill)
    axes.stairs(caches, xs, color="black", linewidth=0.8, label="with PyTorch's cache")
    if history.cap_bytes is not None:
        axes.axhline(
            history.cap_bytes / unit_bytes,
            color="black",
            linewidth=2,
            linestyle="--",
            label=f"cap {format_bytes(history.cap_bytes)}",
        )
    axes.set_xlim(xs[0], xs[-1])
    axes.set_ylim(0, 1.1 * top / unit_bytes)
    axes.set_xlabel("s on the host's clock")
    axes.set_ylabel(f"on the device, {unit}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(f"{title}\n", loc="left", fontsize=13, fontweight="bold")
    axes.text(0, 1.02, _caption(history), transform=axes.transAxes, fontsize=10.5)
    axes.legend(
        frameon=False, fontsize=9.5, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=6
    )
    save_figure(figure, path)


def _bands(moments: list[Moment]) -> Iterator[_Band]:
    """Join a part's moments; what runs for a moment between two steps belongs to them."""
    named = [moment for moment in moments[:-1] if moment.part]
    for part, group in itertools.groupby(named, key=lambda moment: moment.part):
        of_part = list(group)
        after = moments[moments.index(of_part[-1]) + 1]
        yield _Band(part, of_part[0].seconds, after.seconds, len(of_part))


def _draw_bands(axes: Axes, moments: list[Moment]) -> None:
    width = moments[-1].seconds - moments[0].seconds
    for number, band in enumerate(_bands(moments)):
        axes.axvspan(band.begin, band.end, color=_BANDS[number % 2], linewidth=0, zorder=0)
        if band.end - band.begin >= _LEAST_BAND * width:
            times = f", {band.times} times" if band.times > 1 else ""
            axes.text(
                (band.begin + band.end) / 2,
                0.985,
                f"{band.part}{times}",
                transform=axes.get_xaxis_transform(),
                ha="center",
                va="top",
                fontsize=10,
            )


def _caption(history: MemoryHistory) -> str:
    peak = max(history.moments[1:], key=lambda moment: moment.peak_bytes)
    before = history.moments[history.moments.index(peak) - 1]
    where = f" while {before.part} computes" if before.part else " between components"
    text = f"peak {format_bytes(peak.peak_bytes)}{where}"
    pools = [moment.pool_bytes for moment in history.moments]
    text += f"   |   weights of denoisers up to {format_bytes(max(pools))}"
    if history.cap_bytes is None:
        return text
    share = peak.peak_bytes / history.cap_bytes
    return f"{text}   |   {share:.0%} of the cap used"
