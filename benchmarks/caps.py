"""The caps of a sweep, and what the driver says while one holds."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from blockswap.bench.head import gpu_uuid
from blockswap.bench.rows import Row
from blockswap.room import MOST_CAP_MARGIN_BYTES

NUM_CAPS = 12
SMALLEST_RING = 1.5  # of the largest leaf, under the first cap
# What a step takes stays until the next one. Asked every 2 ms, the driver slowed the steps.
SAMPLE_S = 25e-3


@dataclass(frozen=True)
class Ends:
    """Between which caps a model's sweep runs, in bytes.

    Attributes:
        base: what PyTorch reserves in a step, fixed weights included, and small parameters.
        largest: the largest leaf.
        everything: base and all that could stream.
    """

    base: int
    largest: int
    everything: int

    def caps(self) -> list[int]:
        """Return the twelve caps, evenly apart, and the smallest one behind them."""
        free = MOST_CAP_MARGIN_BYTES
        first = self.base + int(SMALLEST_RING * self.largest) + free
        last = self.everything + free
        width = last - first
        even = [first + width * i // (NUM_CAPS - 1) for i in range(NUM_CAPS)]
        return [*even, self.base + self.largest + free]


def about_cap(row: Row, link_gb_per_s: float) -> Row:
    """Return what the sweep promises: the cap holds, and the step is near its frontier.

    Args:
        row: of a whole model, measured.
        link_gb_per_s: the link at its best; a neighbour slows it for a while.
    """
    if row["status"] != "ok":
        return {}
    cap = row["cap_bytes"]
    needed_ms = (row["resident_peak_device_bytes"] - cap) / link_gb_per_s / 1e6
    frontier_ms = max(row["resident_ms"], needed_ms)
    return {
        "holds": row["peak_device_bytes"] <= cap,
        "frontier_of_cap_ms": frontier_ms,
        "efficiency_of_cap": frontier_ms / row["step_ms"],
    }


class DeviceWatch:
    """The most that the driver said is in use on the device, whoever uses it."""

    def __init__(self) -> None:
        import pynvml

        self._nvml = pynvml
        pynvml.nvmlInit()
        self._device = pynvml.nvmlDeviceGetHandleByUUID(gpu_uuid())
        self.peak_bytes = 0
        self._ends = threading.Event()

    def used_bytes(self) -> int:
        """Return what is in use now."""
        return int(self._nvml.nvmlDeviceGetMemoryInfo(self._device).used)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Sample inside the block."""
        self.peak_bytes = 0
        self._ends.clear()

        def sample() -> None:
            while not self._ends.is_set():
                self.peak_bytes = max(self.peak_bytes, self.used_bytes())
                time.sleep(SAMPLE_S)

        thread = threading.Thread(target=sample, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._ends.set()
            thread.join()

    def beside_pytorch(self) -> int:
        """Return what is in use once PyTorch's cache is empty: contexts, and others."""
        torch.cuda.empty_cache()
        return self.used_bytes() - torch.cuda.memory_reserved()
