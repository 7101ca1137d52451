"""What a device's memory holds: PyTorch's share, the pool, what is free."""

from __future__ import annotations

from types import ModuleType

import torch

# Context, fragments and the driver's own needs: left free when no cap is given.
FREE_SHARE = 0.90


class DeviceMemory:
    """Reads and resets PyTorch's statistics of one device, in bytes.

    The CPU keeps no such statistics: all figures are 0 there and its total is unknown.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # CUDA's pool lies outside PyTorch's allocator; other devices count it as theirs.
        self.counts_pool = device.type not in ("cuda", "cpu")
        self._module: ModuleType | None = None
        if device.type != "cpu":
            self._module = torch.get_device_module(device)

    def allocated_bytes(self) -> int:
        """Return what PyTorch's tensors hold now."""
        return int(self._module.memory_allocated(self.device)) if self._module else 0

    def peak_bytes(self) -> int:
        """Return the most that they held since `reset_peak`."""
        return int(self._module.max_memory_allocated(self.device)) if self._module else 0

    def reset_peak(self) -> None:
        """Start a new peak."""
        if self._module:
            self._module.reset_peak_memory_stats(self.device)

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
