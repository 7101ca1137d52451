"""What the links of this machine carry: by size of one copy, in GB/s of 10^9 bytes.

A `Meter` times copies; its figures become rows here, words in probe_text.py, lines in
probe_picture.py.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, Protocol, get_args

from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt

from blockswap.files import PICTURES, check_file, whole_file
from blockswap.progress import Progress
from blockswap.sizes import format_bytes

SCHEMA = 1
CHUNK_BYTES = tuple(2**16 * 4**power for power in range(7))  # 64 KiB to 256 MiB
HOST = "host"
EVERY_DEVICE = "auto"

HostMemory = Literal["pinned", "pageable"]
SecondsPerCopy = Callable[[int], float]


class Device(BaseModel):
    """One end of a link.

    Attributes:
        id: "host", "cuda:0".
        name: of the CPU or GPU.
        pcie_generation: the highest that card and slot both know; None: not known.
        pcie_width: lanes in use.
        numa_node: that the slot hangs on.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    id: str
    name: str
    pcie_generation: int | None = None
    pcie_width: int | None = None
    numa_node: int | None = None


class Link(BaseModel):
    """A way for bytes, in one direction; from a device to itself it is that device's memory.

    Attributes:
        source: id of the device that is read.
        target: id of the device that is written.
        host_memory: kind of the host's memory, on links between it and a GPU.
        peer_access: whether two GPUs reach each other without the host; None: not known.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    source: str
    target: str
    host_memory: HostMemory | None = None
    peer_access: bool | None = None

    @property
    def is_memory(self) -> bool:
        """Whether bytes stay on one device: each is read and written there, and counts twice."""
        return self.source == self.target

    @property
    def is_peer(self) -> bool:
        """Whether both ends are GPUs, two of them."""
        return not self.is_memory and HOST not in (self.source, self.target)

    @property
    def label(self) -> str:
        """Name for people."""
        if self.is_memory:
            return f"{self.source} memory"
        ends = (self.host_memory if end == HOST else end for end in (self.source, self.target))
        return " -> ".join(map(str, ends))


class Row(BaseModel):
    """One size of copy over one link.

    Attributes:
        link: what was measured.
        chunk_bytes: of one copy.
        gb_per_s: median of several samples; None: not measured.
        problem: why not.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    link: Link
    chunk_bytes: PositiveInt
    gb_per_s: PositiveFloat | None = None
    problem: str | None = None


class Probe(BaseModel):
    """All that was measured on one machine on one day.

    Attributes:
        date: as 2026-01-31.
        torch: its version.
        devices: all of the machine, measured or not; the host comes first.
        rows: one link after the other, small copies first.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    schema_version: int = SCHEMA
    date: str
    torch: str
    devices: list[Device]
    rows: list[Row]

    def chunk_bytes(self) -> list[int]:
        """Return the sizes of copy, in order."""
        return sorted({row.chunk_bytes for row in self.rows})

    def by_link(self) -> dict[Link, list[Row]]:
        """Return each link's rows."""
        links: dict[Link, list[Row]] = {}
        for row in self.rows:
            links.setdefault(row.link, []).append(row)
        return links


class Meter(Protocol):
    """Times copies on a machine."""

    torch_version: str

    def devices(self) -> list[Device]:
        """Return all devices, the host first."""

    def links(self) -> list[Link]:
        """Return what is to be measured."""

    def open(self, link: Link, span_bytes: int) -> SecondsPerCopy:
        """Take memory of `span_bytes` at both ends; return what times copies of up to that size.

        Raises:
            MemoryError: it cannot be had. What was returned may raise it as well.
        """


def list_links(
    gpus: Sequence[str], chosen: str, can_access: Callable[[str, str], bool | None]
) -> list[Link]:
    """Return the links to measure: memories, host and GPU, GPU and GPU.

    Args:
        gpus: ids of all GPUs.
        chosen: one of them with its peers, or "host" alone, or "auto": everything.
        can_access: whether the first GPU reaches the second one's memory.
    """
    links = [Link(source=HOST, target=HOST)] if chosen in (HOST, EVERY_DEVICE) else []
    for gpu in gpus:
        if chosen in (gpu, EVERY_DEVICE):
            for kind in get_args(HostMemory):
                links.append(Link(source=HOST, target=gpu, host_memory=kind))
                links.append(Link(source=gpu, target=HOST, host_memory=kind))
            links.append(Link(source=gpu, target=gpu))
    for source, target in itertools.permutations(gpus, 2):
        if chosen in (source, target, EVERY_DEVICE):
            access = can_access(source, target)
            links.append(Link(source=source, target=target, peer_access=access))
    return links


def measure(meter: Meter) -> Probe:
    """Measure all links of a meter, one after the other; a line of progress on a terminal."""
    rows: list[Row] = []
    links = meter.links()
    with Progress("measuring links", len(links) * len(CHUNK_BYTES), "steps") as tick:
        for num_done, link in enumerate(links):
            of_link: list[Row] = []
            for row in _measure_link(meter, link):
                of_link.append(row)
                tick(num_done * len(CHUNK_BYTES) + len(of_link))
            rows += reversed(of_link)
    return Probe(
        date=datetime.date.today().isoformat(),
        torch=meter.torch_version,
        devices=meter.devices(),
        rows=rows,
    )


def _measure_link(meter: Meter, link: Link) -> Iterator[Row]:
    """Large copies first: the memory that they got serves the smaller ones."""
    seconds_per_copy: SecondsPerCopy | None = None
    for chunk_bytes in reversed(CHUNK_BYTES):
        try:
            seconds_per_copy = seconds_per_copy or meter.open(link, chunk_bytes)
            seconds = seconds_per_copy(chunk_bytes)
        except MemoryError as error:
            seconds_per_copy = None
            yield Row(link=link, chunk_bytes=chunk_bytes, problem=str(error))
            continue
        moved_bytes = chunk_bytes * (2 if link.is_memory else 1)
        yield Row(link=link, chunk_bytes=chunk_bytes, gb_per_s=moved_bytes / seconds / 1e9)


def short_bytes(num_bytes: int) -> str:
    """Return a size without the fraction that powers of two do not have: "64 KiB"."""
    return format_bytes(num_bytes).replace(".0 ", " ")


def check_files(out: Path | None, picture: Path | None) -> None:
    """Refuse what could not be written, before anything is measured.

    Raises:
        ConfigError: a wrong suffix, or no folder to write into.
    """
    if out is not None:
        check_file("--out", out, (".json",))
    if picture is not None:
        check_file("--picture", picture, PICTURES)


def save(probe: Probe, out: Path | None, picture: Path | None) -> None:
    """Write JSON and picture, both whole or neither; `check_files` has passed."""
    with contextlib.ExitStack() as files:
        if out is not None:
            part = files.enter_context(whole_file(out))
            part.write_text(probe.model_dump_json(indent=1) + "\n", "utf-8")
        if picture is not None:
            from blockswap.probe_picture import draw

            draw(probe, files.enter_context(whole_file(picture)))
