"""Where a session's weights lie on the device: residents in blocks of their own, and the ring."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch

from blockswap import _C
from blockswap.device_memory import DeviceMemory
from blockswap.host import Host

# Parts of pages between residents that stay, which nobody else can have.
MOST_UNUSED_BYTES = 64 * 2**20


class Placement:
    """Moves only what differs from one plan to the next.

    Args:
        pool: holds the blocks.
        memory: of the device; notes its peak before the pool changes.
        engine: brings images to the device.
        host: has the images.
        token: on the device; tells the stream that computes.

    Attributes:
        ring: where it begins.
    """

    def __init__(
        self,
        pool: _C.Pool,
        memory: DeviceMemory,
        engine: _C.Engine,
        host: Host,
        token: torch.Tensor,
    ) -> None:
        self._pool = pool
        self._memory = memory
        self._engine = engine
        self._host = host
        self._token = token
        self._residents: dict[int, int] = {}  # leaf: address
        self._filled: set[int] = set()  # those whose images were sent there
        self.ring = 0
        self._ring_bytes = 0

    def __contains__(self, leaf: int) -> bool:
        """Whether a leaf is resident."""
        return leaf in self._residents

    def address(self, leaf: int) -> int:
        """Return where a resident leaf lies."""
        return self._residents[leaf]

    def change(
        self, residents: Collection[int], ring_bytes: int, stream: Callable[[], None]
    ) -> list[int]:
        """Free what is not needed any more, then bring what is. The engine must have stopped.

        Copies run while the host still maps memory for those behind them, which takes it as long.

        Args:
            residents: leaves that are to be on the device.
            ring_bytes: how long the ring is to be.
            stream: called when the ring is there: has the engine begin.

        Returns:
            The residents that are new. Until all of it has returned for one of them, the next
            change counts it as new again.

        Raises:
            DeviceError: no memory. The engine has stopped; residents that stayed where they were
                stay, no new one does, nor the ring, nor any if all were to move.
        """
        self._forget_what_was_broken_off()
        staying = self._filled.intersection(residents)
        kept = 0
        if self._unused_between(staying) > MOST_UNUSED_BYTES:
            unused = self._pool.unused_bytes
            self._drop(staying=set())
            # Their pages are for what comes: to map others takes longer.
            kept = self._pool.unused_bytes - unused
        else:
            self._free(staying)
            is_coarse = staying and not self._memory.counts_pool and not self._pool.page_bytes
            if is_coarse and self._pool.unused_bytes > MOST_UNUSED_BYTES:
                self._free(staying=set())
        missing = [leaf for leaf in residents if leaf not in self._residents]
        needed = ring_bytes + sum(self._host.image_bytes[leaf] for leaf in missing)
        free = self._memory.free_bytes()
        if free is not None and needed - kept > free:
            self._memory.give_back()  # what PyTorch caches but does not use
        new: list[int] = []
        try:
            if ring_bytes:
                self._ring_bytes = ring_bytes
                self.ring = self._pool.allocate(ring_bytes, self._token)
            stream()
            for leaf in missing:
                size = self._host.image_bytes[leaf]
                self._residents[leaf] = self._pool.allocate(size, self._token)
                self.copy(leaf)
                new.append(leaf)
        except BaseException:
            try:
                self._engine.stop()  # it copies into what is freed now
            finally:
                self._free(staying.intersection(self._residents).difference(missing))
            raise
        if kept:
            self._pool.give_back()
        return new

    def leave_room(self, at_least_bytes: int) -> None:
        """Free the ring, and residents until that much is freed. The engine must have stopped.

        Those at the highest addresses go, whatever their priority: they all come back before the
        next step, and what stays without a hole holds no page of which others could have a part.
        """
        self._forget_what_was_broken_off()
        missing = at_least_bytes - (self._ring_bytes if self.ring else 0)
        staying = sorted(self._filled, key=self.address)
        while staying and missing > 0:
            missing -= self._host.image_bytes[staying.pop()]
        self._free(staying=set(staying))

    def clear(self) -> None:
        """Free everything. The engine must have stopped."""
        self._forget_what_was_broken_off()
        self._free(staying=set())

    def copy(self, leaf: int) -> None:
        """Bring a resident's image to the device before the next step."""
        size = self._host.image_bytes[leaf]
        self._engine.copy_fixed(self.address(leaf), self._host.image(leaf), size, self._token)
        self._filled.add(leaf)

    def _forget_what_was_broken_off(self) -> None:
        """Free everything if Ctrl-C came between a block's taking or freeing and our note of it."""
        noted = self._ring_bytes if self.ring else 0
        noted += sum(self._host.image_bytes[leaf] for leaf in self._residents)
        if self._pool.bytes != noted:
            self._pool.release()
            self._residents.clear()
            self._filled.clear()
            self.ring = 0

    def _free(self, staying: set[int]) -> None:
        """Free the ring and all residents but these, and give back what then is unused."""
        self._drop(staying)
        self._pool.give_back()

    def _drop(self, staying: set[int]) -> None:
        self._memory.begin_span()
        if len(self._filled) < len(self._residents):
            self._wait()
        if self.ring:
            self._pool.free(self.ring)
            self.ring = 0
        for leaf in [leaf for leaf in self._residents if leaf not in staying]:
            self._filled.discard(leaf)
            self._pool.free(self._residents.pop(leaf))

    def _unused_between(self, staying: set[int]) -> int:
        """Return what of their pages nobody could have if only these residents stayed.

        0 where memory does not come in pages; what PyTorch counts as its own is for it to judge.
        """
        page_bytes = int(self._pool.page_bytes)
        if self._memory.counts_pool or not page_bytes:
            return 0
        used, pages = 0, set[int]()
        for leaf in staying:
            begin, size = self._residents[leaf], self._host.image_bytes[leaf]
            used += size
            pages.update(range(begin // page_bytes, -(-(begin + size) // page_bytes)))
        return int(len(pages) * page_bytes - used)

    def _wait(self) -> None:
        """Wait for what ran on the device when a change was broken off: it may use blocks yet."""
        if self._token.device.type != "cpu":
            torch.get_device_module(self._token.device).synchronize(self._token.device)
