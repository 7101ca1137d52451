"""PyTorch's share of a cap: what its allocator may reserve."""

from __future__ import annotations

from blockswap.device_memory import DeviceMemory


class Share:
    """Bounds what PyTorch reserves while a session or a component computes.

    PyTorch knows one limit per device and process. It is set for each forward and taken back behind
    it: so several sessions on a device have each their own, and what a script does between forwards
    is not ours to bound.

    Args:
        memory: of the device.
        cap_bytes: for PyTorch and the pools together; None: nothing is bounded.
    """

    def __init__(self, memory: DeviceMemory, cap_bytes: int | None) -> None:
        self._memory = memory
        self._cap_bytes = cap_bytes
        self._total = memory.limited_bytes()
        self._found: float | None = None  # the limit before ours; None: ours is not set

    def impose(self, beside_bytes: int) -> None:
        """Let PyTorch reserve what the cap leaves.

        Args:
            beside_bytes: what others than PyTorch hold of the cap.
        """
        if self._cap_bytes is None or self._total is None:
            return
        if self._found is None:
            self._found = self._memory.limit()
        left = max(0, self._cap_bytes - beside_bytes)
        self._memory.set_limit(min(self._found, left / self._total))

    def lift(self) -> None:
        """Give PyTorch back the limit that it had. Safe to call twice."""
        found, self._found = self._found, None
        if found is not None:
            self._memory.set_limit(found)
