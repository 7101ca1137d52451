"""Times copies with PyTorch: events on the device's stream, the clock where there is no device."""

from __future__ import annotations

import itertools
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from blockswap.config import SwapConfig
from blockswap.probe import (
    EVERY_DEVICE,
    HOST,
    Device,
    Link,
    SecondsPerCopy,
    list_links,
    short_bytes,
)

PCI_DEVICES = Path("/sys/bus/pci/devices")
GENERATION_OF_SPEED = {"2.5": 1, "5.0": 2, "8.0": 3, "16.0": 4, "32.0": 5, "64.0": 6}  # GT/s

NUM_SAMPLES = 7  # odd: the median is one of them
MAX_COPIES_PER_SAMPLE = 256  # more would fill the queue of the driver, and the host would wait
WARM_UP_SECONDS = 0.2  # idle links and memories run at a lower clock

Copy = Callable[[int], None]


class TorchMeter:
    """Times copies between the devices that torch sees.

    One caller thread; works on each device's current stream. A copy never takes the bytes of the
    copy before it: they would come out of a cache.

    Args:
        device: "auto", or one device with its peers; "cpu" is the host alone.

    Raises:
        ConfigError: no device that torch knows. DeviceError: it does not exist here.
    """

    def __init__(self, device: str = EVERY_DEVICE) -> None:
        self.torch_version = str(torch.__version__)
        self._chosen = device
        if device != EVERY_DEVICE:
            target = SwapConfig(device=device).target_device()
            self._chosen = HOST if target.type == "cpu" else str(target)
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        self._gpus: list[torch.device] = []
        if accelerator is not None:
            indices = range(torch.accelerator.device_count())
            self._gpus = [torch.device(accelerator.type, index) for index in indices]

    def devices(self) -> list[Device]:
        """Return all devices, the host first."""
        return [Device(id=HOST, name=_cpu_name()), *map(_describe, self._gpus)]

    def links(self) -> list[Link]:
        """Return what is to be measured."""
        return list_links([str(gpu) for gpu in self._gpus], self._chosen, _can_access)

    def open(self, link: Link, span_bytes: int) -> SecondsPerCopy:
        """Take memory of `span_bytes` at both ends; return what times copies of up to that size.

        Raises:
            MemoryError: it cannot be had.
        """
        source = _take(link.source, link.host_memory, span_bytes)
        target = _take(link.target, link.host_memory, span_bytes)
        gpu = next((end.device for end in (source, target) if end.device.type != "cpu"), None)
        if gpu is None:
            return _timed_by_clock(source, target)
        # PyTorch copies between two GPUs on the source's stream.
        return _timed_by_events(source, target, gpu, link.host_memory != "pageable")


def _take(device: str, host_memory: str | None, num_bytes: int) -> torch.Tensor:
    """Return bytes on a device; those of the host are touched, so that their pages exist."""
    kind = f"{host_memory or 'host'} memory" if device == HOST else f"memory of {device}"
    try:
        if device != HOST:
            return torch.empty(num_bytes, dtype=torch.uint8, device=device)
        is_pinned = host_memory == "pinned"
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=is_pinned).fill_(1)
    except RuntimeError as error:  # what torch and drivers raise for memory alone differs
        raise MemoryError(f"{short_bytes(num_bytes)} of {kind} could not be had") from error


def _timed_by_events(
    source: torch.Tensor, target: torch.Tensor, gpu: torch.device, is_async: bool
) -> SecondsPerCopy:
    """Return what times copies on a GPU's current stream."""
    stream = torch.accelerator.current_stream(gpu)
    begin = torch.Event(gpu, enable_timing=True)
    end = torch.Event(gpu, enable_timing=True)
    warm_until = time.perf_counter() + WARM_UP_SECONDS
    while time.perf_counter() < warm_until:
        target.copy_(source, non_blocking=is_async)
        torch.accelerator.synchronize(gpu)

    def seconds_per_copy(chunk_bytes: int) -> float:
        copy, num_copies = _walk(source, target, chunk_bytes, is_async)
        copy(num_copies)
        samples_ms = []
        for _ in range(NUM_SAMPLES):
            if is_async:
                # Over a host's link, what is timed is enqueued behind this: the host's pace does
                # not show. Small copies within a device or between two still show it.
                target.copy_(source, non_blocking=True)
            begin.record(stream)
            copy(num_copies)
            end.record(stream)
            end.synchronize()
            samples_ms.append(begin.elapsed_time(end))
        return 1e-3 * statistics.median(samples_ms) / num_copies

    return seconds_per_copy


def _timed_by_clock(source: torch.Tensor, target: torch.Tensor) -> SecondsPerCopy:
    """Return what times copies that block the caller."""

    def seconds_per_copy(chunk_bytes: int) -> float:
        copy, num_copies = _walk(source, target, chunk_bytes, is_async=False)
        copy(num_copies)
        samples_s = []
        for _ in range(NUM_SAMPLES):
            begin_s = time.perf_counter()
            copy(num_copies)
            samples_s.append(time.perf_counter() - begin_s)
        return statistics.median(samples_s) / num_copies

    return seconds_per_copy


def _walk(
    source: torch.Tensor, target: torch.Tensor, chunk_bytes: int, is_async: bool
) -> tuple[Copy, int]:
    """Return what copies the next so many chunks, round and round, and how many make a sample."""
    parts, places = (memory.view(-1, chunk_bytes).unbind() for memory in (source, target))
    endless = itertools.cycle(zip(parts, places, strict=True))

    def copy(num_copies: int) -> None:
        for part, place in itertools.islice(endless, num_copies):
            place.copy_(part, non_blocking=is_async)

    return copy, min(MAX_COPIES_PER_SAMPLE, len(parts))


def _can_access(source: str, target: str) -> bool | None:
    """Whether one GPU reaches another's memory; None where torch does not say."""
    if torch.device(source).type != "cuda":
        return None
    return bool(torch.cuda.can_device_access_peer(torch.device(source), torch.device(target)))


def _describe(gpu: torch.device) -> Device:
    module = torch.get_device_module(gpu)
    name_of = getattr(module, "get_device_name", None)
    name = str(name_of(gpu)) if name_of is not None else gpu.type
    properties_of = getattr(module, "get_device_properties", None)
    place = properties_of(gpu) if properties_of is not None else None
    if place is None or not hasattr(place, "pci_bus_id"):
        return Device(id=str(gpu), name=name)
    address = f"{place.pci_domain_id:04x}:{place.pci_bus_id:02x}:{place.pci_device_id:02x}.0"
    generation, width, numa_node = read_slot(PCI_DEVICES / address)
    return Device(
        id=str(gpu),
        name=name,
        pcie_generation=generation,
        pcie_width=width,
        numa_node=numa_node,
    )


def read_slot(card: Path) -> tuple[int | None, int | None, int | None]:
    """Return PCIe generation, lanes in use and NUMA node of a card; None for what is not known.

    Args:
        card: its folder in sysfs. The port that it hangs on is the folder around it.
    """
    port = card.resolve().parent
    # The current speed falls while a card idles: the lower of what both ends can do is what counts.
    speeds = (_read(end / "max_link_speed").partition(" ")[0] for end in (card, port))
    generations = [g for g in map(GENERATION_OF_SPEED.get, speeds) if g is not None]
    width, node = _read(card / "current_link_width"), _read(card / "numa_node")
    return (
        min(generations, default=None),
        int(width) if width.isdigit() and int(width) > 0 else None,
        int(node) if node.isdigit() else None,  # -1: the machine has no nodes
    )


def _read(path: Path) -> str:
    try:
        return path.read_text("ascii").strip()
    except OSError:
        return ""


def _cpu_name() -> str:
    for line in _read(Path("/proc/cpuinfo")).splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
