"""PyTorch's share of a cap: what its allocator may reserve."""

from __future__ import annotations

import threading
import weakref
from typing import ClassVar

from blockswap.device_memory import DeviceMemory


class Limit:
    """PyTorch's limit of one device: the smallest of what several ask for, else the user's own.

    PyTorch knows one limit per device and process. Sessions in several threads set it at once. It
    lives as long as the process, and so keeps nobody's memory.
    """

    _of_device: ClassVar[dict[tuple[str, int], Limit]] = {}

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a finalizer may run in the middle
        self._asked: dict[int, float] = {}  # by whom
        self._users = 1.0
        self._told: float | None = 1.0  # PyTorch, by us; None: that was broken off
        self._echo: float | None = None  # of it: PyTorch rounds what it is told

    @classmethod
    def of(cls, memory: DeviceMemory) -> Limit:
        """Return the limit of a device."""
        return cls._of_device.setdefault(memory.key, cls())

    def ask(self, memory: DeviceMemory, who: int, share: float) -> None:
        """Let PyTorch reserve no more than this share of the device."""
        with self._lock:
            if not self._asked and (found := memory.limit()) != self._echo:
                self._users = self._told = found
            self._asked[who] = share
            self._tell(memory)

    def is_asked_by(self, who: int) -> bool:
        """Whether somebody bounds it now."""
        return who in self._asked

    def release(self, memory: DeviceMemory, who: int) -> None:
        """Ask for nothing any more. Safe to call twice."""
        with self._lock:
            self._asked.pop(who, None)
            self._tell(memory)

    def _tell(self, memory: DeviceMemory) -> None:
        # Again, if what is asked for has changed meanwhile: see the lock.
        while (smallest := min((self._users, *self._asked.values()))) != self._told:
            self._told = None
            memory.set_limit(smallest)
            self._echo = memory.limit()
            self._told = smallest


class Share:
    """Bounds what PyTorch reserves while a session or a component computes.

    It is set for each forward and taken back behind it: what a script does between forwards is not
    ours to bound.

    Args:
        memory: of the device.
        cap_bytes: for PyTorch and the pools together; None: nothing is bounded.
    """

    def __init__(self, memory: DeviceMemory, cap_bytes: int | None) -> None:
        self._memory = memory
        self._cap_bytes = cap_bytes
        self._total = memory.limited_bytes()
        self._limit = Limit.of(memory)
        weakref.finalize(self, self._limit.release, memory, id(self))

    def impose(self, beside_bytes: int) -> None:
        """Let PyTorch reserve what the cap leaves.

        Args:
            beside_bytes: what others than PyTorch hold of the cap.
        """
        if self._cap_bytes is not None and self._total is not None:
            left = max(0, self._cap_bytes - beside_bytes)
            self._limit.ask(self._memory, id(self), min(1.0, left / self._total))

    def refresh(self, beside_bytes: int) -> None:
        """Impose again, if it is imposed: others hold something else of the cap now."""
        if self._limit.is_asked_by(id(self)):
            self.impose(beside_bytes)

    def lift(self) -> None:
        """Bound nothing any more. Safe to call twice."""
        self._limit.release(self._memory, id(self))
