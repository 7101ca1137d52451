"""The leaves that stay on the device."""

from __future__ import annotations

from collections.abc import Collection

import torch

from blockswap import _C
from blockswap.host import Host


class Residents:
    """Each leaf in a block of its own, so that another plan moves only what differs.

    Args:
        pool: holds the blocks.
        engine: brings images to the device.
        host: has the images.
        token: on the device; tells the stream that computes.
    """

    def __init__(self, pool: _C.Pool, engine: _C.Engine, host: Host, token: torch.Tensor) -> None:
        self._pool = pool
        self._engine = engine
        self._host = host
        self._token = token
        self._addresses: dict[int, int] = {}

    def __contains__(self, leaf: int) -> bool:
        return leaf in self._addresses

    def address(self, leaf: int) -> int:
        """Return where a resident leaf lies."""
        return self._addresses[leaf]

    def missing_bytes(self, leaves: Collection[int]) -> int:
        """Return what those that are not there take."""
        return sum(self._host.image_bytes[leaf] for leaf in leaves if leaf not in self)

    def drop(self, staying: Collection[int]) -> None:
        """Free all but these."""
        for leaf in [leaf for leaf in self._addresses if leaf not in staying]:
            self._pool.free(self._addresses.pop(leaf), self._token)

    def make_room(self, leaves: Collection[int]) -> list[int]:
        """Return those that are new and still need `copy`.

        Raises:
            DeviceError: no memory; those that were there stay, no new one does.
        """
        new: list[int] = []
        try:
            for leaf in leaves:
                if leaf not in self:
                    size = self._host.image_bytes[leaf]
                    self._addresses[leaf] = self._pool.allocate(size, self._token)
                    new.append(leaf)
        except BaseException:
            for leaf in new:
                self._pool.free(self._addresses.pop(leaf), self._token)
            raise
        return new

    def copy(self, leaf: int) -> None:
        """Bring a leaf's image to the device before the next step."""
        size = self._host.image_bytes[leaf]
        self._engine.copy_fixed(self.address(leaf), self._host.image(leaf), size, self._token)
