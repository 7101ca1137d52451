"""What a device's memory holds: PyTorch's share, the pool, what is free."""

from __future__ import annotations

from types import ModuleType

import torch

# Context, fragments and the driver's own needs: left free when no cap is given.
FREE_SHARE = 0.90


class DeviceMemory:
    """Reads and resets PyTorch's statistics of one device, in bytes.

    The CPU keeps no such statistics: all figures are 0 there and its total is unknown.

    Attributes:
        peak_allocated_bytes: the most that PyTorch's tensors and the pool held together.
        peak_device_bytes: the same with what PyTorch keeps reserved.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # CUDA's pool lies outside PyTorch's allocator; other devices count it as theirs.
        self.counts_pool = device.type not in ("cuda", "cpu")
        self.peak_allocated_bytes = self.peak_device_bytes = 0
        self._module: ModuleType | None = None
        if device.type != "cpu":
            self._module = torch.get_device_module(device)

    def allocated_bytes(self) -> int:
        """Return what PyTorch's tensors hold now."""
        return int(self._module.memory_allocated(self.device)) if self._module else 0

    def span_peak_bytes(self) -> int:
        """Return the most that they held since `begin_span`."""
        return int(self._module.max_memory_allocated(self.device)) if self._module else 0

    def peak_with(self, pool_bytes: int) -> int:
        """Return that peak and a pool that stood beside it; 0 where nothing is counted."""
        if self._module is None:
            return 0
        return self.span_peak_bytes() + (0 if self.counts_pool else pool_bytes)

    def begin_peaks(self) -> None:
        """Forget all peaks."""
        self.begin_span(0)
        self.peak_allocated_bytes = self.peak_device_bytes = 0

    def begin_span(self, pool_bytes: int) -> None:
        """Start a new peak of PyTorch's; the last one is noted with the pool's size then."""
        self.note_peak(pool_bytes)
        if self._module:
            self._module.reset_peak_memory_stats(self.device)

    def note_peak(self, pool_bytes: int) -> None:
        """Take the peak of the span so far with the pool's size, which is about to change."""
        if self._module is None:
            return
        pool = 0 if self.counts_pool else pool_bytes
        reserved = getattr(self._module, "max_memory_reserved", self._module.max_memory_allocated)
        self.peak_allocated_bytes = max(self.peak_allocated_bytes, self.peak_with(pool_bytes))
        self.peak_device_bytes = max(self.peak_device_bytes, reserved(self.device) + pool)

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
