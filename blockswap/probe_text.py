"""What a probe says to people: a table, and one sentence for each thing worth knowing."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator, Mapping, Sequence

from rich.console import Console
from rich.table import Table

from blockswap.probe import HOST, Device, Link, Probe, Row, short_bytes

_NEARLY = 0.9  # of the best speed: copies of this size are large enough
_AS_FAST = 1.1  # a smaller factor between two speeds is not worth a word
_WIDTH = 100


def best_gb_per_s(rows: Sequence[Row]) -> float | None:
    """Return the highest speed of a link; of a memory, that of the largest copies.

    Smaller copies between two places of one memory stay in its cache.
    """
    speeds = [row.gb_per_s for row in rows if row.gb_per_s is not None]
    if not speeds:
        return None
    return speeds[-1] if rows[0].link.is_memory else max(speeds)


def large_enough_bytes(rows: Sequence[Row]) -> int | None:
    """Return the size from which on each copy reaches 90 % of the best; None: not even the largest.

    Args:
        rows: of one link, small copies first.
    """
    best, enough = best_gb_per_s(rows), None
    for row in reversed(rows):
        if row.gb_per_s is not None and best is not None:
            if row.gb_per_s < _NEARLY * best:
                break
            enough = row.chunk_bytes
    return enough


def sentences(probe: Probe) -> list[str]:
    """Return what is worth knowing, one plain sentence each."""
    said = []
    gpus = [device for device in probe.devices if device.id != HOST]
    if not gpus:
        said.append(
            "torch sees no GPU here, so only host memory was measured; `blockswap doctor` says why."
        )
    links = probe.by_link()
    best = {link: best_gb_per_s(rows) for link, rows in links.items()}
    if speed := best.get(Link(source=HOST, target=HOST)):
        said.append(f"Host memory moves {speed:.1f} GB/s, reads and writes together.")
    for gpu in gpus:
        said += _about_gpu(gpu, links)
    said += _about_peers({link: speed for link, speed in best.items() if link.is_peer and speed})
    for link, rows in links.items():
        failed = [row for row in rows if row.problem]
        if failed:
            sizes = ", ".join(short_bytes(row.chunk_bytes) for row in failed)
            said.append(f"{link.label} was not measured at {sizes}: {failed[0].problem}.")
    return said


def _about_gpu(gpu: Device, links: Mapping[Link, list[Row]]) -> Iterator[str]:
    def best_of(**ends: str) -> float | None:
        return best_gb_per_s(links.get(Link.model_validate(ends), []))

    pinned = best_of(source=HOST, target=gpu.id, host_memory="pinned")
    if pinned:
        rows = links[Link(source=HOST, target=gpu.id, host_memory="pinned")]
        enough = large_enough_bytes(rows)
        if enough:
            reach = f"copies of {short_bytes(enough)} and more reach {_NEARLY:.0%} of that"
        else:
            reach = "larger copies are slower again: the link was not idle, or throttles"
        yield f"{_describe(gpu)} takes {pinned:.1f} GB/s from pinned memory; {reach}."
    pageable = best_of(source=HOST, target=gpu.id, host_memory="pageable")
    if pinned and pageable:
        factor = pinned / pageable
        slower = f"{factor:.1f} times slower" if factor >= _AS_FAST else "as fast"
        yield f"From pageable memory {gpu.id} is {slower}: {pageable:.1f} GB/s."
    if back := best_of(source=gpu.id, target=HOST, host_memory="pinned"):
        yield f"Back to pinned memory {gpu.id} gives {back:.1f} GB/s."
    if memory := best_of(source=gpu.id, target=gpu.id):
        yield f"Memory of {gpu.id} moves {memory:.1f} GB/s, reads and writes together."


def _describe(gpu: Device) -> str:
    parts = [gpu.name]
    if gpu.pcie_generation and gpu.pcie_width:
        parts.append(f"PCIe {gpu.pcie_generation} x{gpu.pcie_width}")
    if gpu.numa_node is not None:
        parts.append(f"NUMA node {gpu.numa_node}")
    return f"{gpu.id} ({', '.join(parts)})"


def _about_peers(best: Mapping[Link, float]) -> Iterator[str]:
    texts = {
        True: "GPUs reach each other directly",
        False: "GPUs have no peer access, so copies pass through host memory",
        None: "GPUs copy to each other, whether directly is not known",
    }
    for access, text in texts.items():
        speeds = {link.label: speed for link, speed in best.items() if link.peer_access is access}
        if speeds:
            which = "" if len(speeds) == len(best) else f" ({', '.join(speeds)})"
            low, high = (f"{speed:.1f}" for speed in (min(speeds.values()), max(speeds.values())))
            yield f"{text}{which}: {low if low == high else f'{low} to {high}'} GB/s."


def as_text(probe: Probe) -> str:
    """Return the table and the sentences; colours only where stdout is a terminal."""
    console = Console(
        file=io.StringIO(),
        force_terminal=sys.stdout.isatty(),
        width=_WIDTH,
        highlight=False,
        markup=False,
        emoji=False,
        legacy_windows=False,
    )
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("GB/s by size of copy")
    for chunk_bytes in probe.chunk_bytes():
        table.add_column(short_bytes(chunk_bytes), justify="right")
    for link, rows in probe.by_link().items():
        speeds = ("-" if row.gb_per_s is None else f"{row.gb_per_s:.1f}" for row in rows)
        table.add_row(link.label, *speeds)
    console.print(table)
    text = console.file.getvalue() if isinstance(console.file, io.StringIO) else ""
    lines = [line.rstrip() for line in text.splitlines()]
    return "\n".join([*lines, "", *sentences(probe)])
