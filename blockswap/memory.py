"""What a device's memory holds: PyTorch's share, the pool, what is free."""

from __future__ import annotations

import weakref
from types import ModuleType
from typing import ClassVar

import torch

from blockswap import _C

# Context, fragments and the driver's own needs: left free when no cap is given.
FREE_SHARE = 0.90


class DeviceMemory:
    """Reads and resets PyTorch's statistics of one device, in bytes.

    PyTorch keeps one peak per device. So that no user of it loses what another one began, all note
    the peak before any of them starts a new span. The CPU keeps no such statistics: what PyTorch
    holds is 0 there, and the device's total is unknown.

    Attributes:
        pool: what this user holds beside PyTorch's allocator, if anything.
        watches: whether the peaks below grow.
        peak_allocated_bytes: the most that PyTorch's tensors and the pool held together.
        peak_device_bytes: the same with what PyTorch keeps reserved.
    """

    _all: ClassVar[weakref.WeakSet[DeviceMemory]] = weakref.WeakSet()

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._key = (device.type, device.index or 0)
        # CUDA's pool lies outside PyTorch's allocator; other devices count it as theirs.
        self.counts_pool = device.type not in ("cuda", "cpu")
        self.pool: _C.Pool | None = None
        self.watches = False
        self.peak_allocated_bytes = self.peak_device_bytes = 0
        self._module: ModuleType | None = None
        if device.type != "cpu":
            self._module = torch.get_device_module(device)
        self._all.add(self)

    def allocated_bytes(self) -> int:
        """Return what PyTorch's tensors hold now."""
        return int(self._module.memory_allocated(self.device)) if self._module else 0

    @property
    def pool_beside_bytes(self) -> int:
        """Return what the pool holds beyond what PyTorch counts."""
        return 0 if self.pool is None or self.counts_pool else self.pool.bytes

    def free_bytes(self) -> int | None:
        """Return what the driver could give now; None when it is not known."""
        return int(self._module.mem_get_info(self.device)[0]) if self._module else None

    def span_peak_bytes(self) -> int:
        """Return the most that they held in this span."""
        return int(self._module.max_memory_allocated(self.device)) if self._module else 0

    def watch(self) -> None:
        """Count peaks from here on."""
        self.begin_span()
        self.watches = True

    def unwatch(self) -> None:
        """Count peaks no more, until `watch`."""
        self.note_peak()
        self.watches = False

    def begin_span(self) -> None:
        """Start a new span, after everybody who watches this device has noted the last one."""
        for memory in list(self._all):
            if memory._key == self._key:
                memory.note_peak()
        if self._module:
            self._module.reset_peak_memory_stats(self.device)

    def note_peak(self) -> None:
        """Take the span's peak so far with the pool as it is now, before that changes."""
        if not self.watches:
            return
        span = self.span_peak_bytes()
        allocated_bytes = span + self.pool_beside_bytes
        reserved = getattr(self._module, "max_memory_reserved", None)
        unused_bytes = int(reserved(self.device)) - span if reserved else 0
        device_bytes = allocated_bytes + unused_bytes
        self.peak_allocated_bytes = max(self.peak_allocated_bytes, allocated_bytes)
        self.peak_device_bytes = max(self.peak_device_bytes, device_bytes)

    def total_bytes(self) -> int | None:
        """Return the device's memory; None when it is not known."""
        return int(self._module.mem_get_info(self.device)[1]) if self._module else None

    def available_bytes(self) -> int | None:
        """Return what this process may hold in all: what it holds plus what is free.

        At most `FREE_SHARE` of the device.
        """
        if self._module is None:
            return None
        free, total = self._module.mem_get_info(self.device)
        held = getattr(self._module, "memory_reserved", self._module.memory_allocated)
        return int(min(FREE_SHARE * total, held(self.device) + free))

    def give_back(self) -> int:
        """Return PyTorch's unused cached memory to the device; the bytes given back."""
        if self._module is None or not hasattr(self._module, "empty_cache"):
            return 0
        before = int(self._module.mem_get_info(self.device)[0])
        self._module.empty_cache()
        return int(self._module.mem_get_info(self.device)[0]) - before
