"""The link from pinned host memory to one device: how fast it is, and how it is slowed."""

from __future__ import annotations

from typing import Protocol

import torch

from blockswap import _C
from blockswap.errors import DeviceError
from blockswap.host import Host
from blockswap.learning import needed_slowdown

PROBE_BYTES = 64 * 2**20
LEAST_PROBE_BYTES = 2**20
PROBE_REPEATS = 40


class HasEngine(Protocol):
    """What copies; it is another one each time that a model is taken."""

    engine: _C.Engine


class Link:
    """Speeds in bytes per second.

    Args:
        owner: of the engine; a session's link must not keep what the session gave back.
        throttle_gb_per_s: what the user slows it down to.

    Attributes:
        measured: of large copies, alone on the link.
        speed: what plans count on: as measured, as a real step showed it, or the user's throttle.
    """

    def __init__(self, owner: HasEngine, throttle_gb_per_s: float | None) -> None:
        self._owner = owner
        self._throttle = 1e9 * throttle_gb_per_s if throttle_gb_per_s is not None else None
        self.measured = self.speed = 0.0

    def measure(
        self,
        host: Host,
        pool: _C.Pool,
        token: torch.Tensor,
        room: int | None,
        ring: int,
        is_gpu: bool,
    ) -> None:
        """Time copies from the host's images to the pool.

        Args:
            host: whose images are copied.
            pool: where to.
            token: on the device.
            room: bytes that a cap leaves; None: enough.
            ring: bytes of the smallest ring, for which there must be room.
            is_gpu: its link wakes up slowly, and needs more copies.
        """
        least = min(LEAST_PROBE_BYTES, ring)
        wanted = PROBE_BYTES if room is None else max(min(room, PROBE_BYTES), least)
        num_bytes = min(wanted, host.arena.chunk_end(0))  # no copy may cross the end of a chunk
        while True:
            try:
                target = pool.allocate(num_bytes, token)
                break
            except DeviceError:
                if num_bytes < 2 * least:
                    raise
                num_bytes //= 2  # others have taken the room
        repeats = PROBE_REPEATS if is_gpu else 2
        image = (host.arena.address, host.arena.is_pinned(0, num_bytes))
        try:
            engine = self._owner.engine
            self.measured = engine.measure_link(image, target, num_bytes, repeats, token)
        finally:
            pool.free(target)
            pool.give_back()
        self.learn(self.measured)
        self.slow_down(1.0)

    def learn(self, speed: float) -> None:
        """Count on this speed, as far as the throttle allows it."""
        self.speed = speed if self._throttle is None else min(speed, self._throttle)

    def outlast(self, host_seconds: float, step_seconds: float, num_bytes: int) -> None:
        """Slow down until a device that waited for the host waits for its copies.

        Args:
            host_seconds: what the host took to issue a step.
            step_seconds: what the device took for it.
            num_bytes: what the step copies.
        """
        copy_seconds = num_bytes / self.speed if self.speed > 0 else 0.0
        self.slow_down(needed_slowdown(step_seconds, host_seconds, copy_seconds))

    def slow_down(self, factor: float) -> None:
        """Make later copies last so many times as long; 1.0: as the user wants them."""
        wanted = min(self._throttle or self.measured, self.measured)
        is_slower = factor > 1.0 or self._throttle is not None
        self._owner.engine.throttle(wanted / factor if is_slower else 0.0, self.measured)
