"""The host's side of the weights: one arena that holds every image, exactly once."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from blockswap import _C
from blockswap.options import BOUNCE_SHARE, SMALLEST_BOUNCE_BYTES
from blockswap.progress import progress

# A piece never crosses a chunk: large ones cost few cuts, small ones let pinning overlap copying.
CHUNK_BYTES = 2**30
# Under a bound on pinned memory: this share of it at most, so that little of it stays unused.
CHUNK_SHARE = 8
# The bounce ring: what pageable weights pass through. Four slots of 16 MiB keep any link busy.
BOUNCE_BYTES = 64 * 2**20
# Images may be laid out anew in the order in which they run, this many bytes at a time.
MAX_SCRATCH_BYTES = 512 * 2**20


class Host:
    """Owns the arena; knows where each leaf's image lies in it.

    Leaf numbers are the binding's; the last one may be the group of small parameters.

    Args:
        binding: of the parameters.
        device: pins the memory.
        limit: bound on pinned bytes, ring included; None: what the system allows.

    Attributes:
        image_bytes: of each leaf's image.
        pinner: knows what is pinned, the ring included.
        arrangement: how often images have moved since.
        bounce_bytes: the ring through which pageable images pass; 0: there is none.
    """

    def __init__(self, binding: _C.Binding, device: _C.Device, limit: int | None) -> None:
        self._binding = binding
        self._device = device
        self._limit = limit
        self.pinner = _C.Pinner(device) if limit is None else _C.Pinner(device, limit)
        self.bounce_bytes = self.arrangement = 0
        self.image_bytes = [binding.leaf_bytes(leaf) for leaf in range(binding.num_leaves)]
        chunk_bytes = CHUNK_BYTES if limit is None else min(CHUNK_BYTES, limit // CHUNK_SHARE)
        self._layout, chunks, total = _C.HostArena.make_layout(self.image_bytes, chunk_bytes)
        self.arena = _C.HostArena(total, chunks)

    def take(self, num_entries: int, engine: _C.Engine | None) -> None:
        """Move all parameters in; each original is let go as soon as its image is complete.

        Interrupted or failing, each parameter has either its original or its image, both whole.

        Args:
            num_entries: how many parameters the binding has.
            engine: gets a bounce ring where not everything can be pinned; None: copies are the
                host's own work, which needs none.
        """
        if engine is not None and self._limit is not None and self._limit < self.arena.bytes:
            self._bounce(engine)  # before the images take all that may be pinned
        for leaf, offset in enumerate(self._layout):
            self._binding.place_host(leaf, self.arena, offset)
        with progress("moving weights to pinned memory", self.arena.bytes) as tick:

            def show(done: int) -> bool:
                tick(done)
                return True

            self._binding.fill(self.arena, 0, show, self.pinner)
            self.arena.pin(self.pinner)
            done = 0
            for entry in range(num_entries):  # what did not lie in CPU memory
                if not self._binding.is_adopted(entry):
                    self._binding.adopt(entry)
                    done += self._binding.host(entry).nbytes
                    tick(done)
        self._binding.settle()
        if engine is None or self.bounce_bytes or not self.pageable_bytes:
            return
        while not self._bounce(engine):
            if not self.arena.unpin_last():
                break  # the system pins nothing at all

    def _bounce(self, engine: _C.Engine) -> bool:
        wanted = min(BOUNCE_BYTES, max(int(self.arena.bytes), SMALLEST_BOUNCE_BYTES))
        if self._limit is not None:
            wanted = min(wanted, self._limit // BOUNCE_SHARE)
        self.bounce_bytes = engine.bounce(self._device, self.pinner, wanted)
        return self.bounce_bytes > 0

    @property
    def pageable_bytes(self) -> int:
        """Return the bytes of images that are not pinned."""
        return int(self.arena.bytes - self.arena.pinned_bytes)

    def image(self, leaf: int) -> tuple[int, bool]:
        """Return the host address of a leaf's image, and whether it is pinned."""
        is_pinned = self.arena.is_pinned(self._offset(leaf), self.image_bytes[leaf])
        return self.address(leaf), bool(is_pinned)

    def address(self, leaf: int) -> int:
        """Return the host address of a leaf's image."""
        return int(self.arena.address) + self._offset(leaf)

    def follows(self, leaf: int, before: int) -> bool:
        """Whether ``leaf``'s image lies right behind ``before``'s, so that one copy takes both."""
        begin = self._offset(before)
        end = begin + self.image_bytes[before]
        chunk_end = int(self.arena.chunk_end(begin))
        return bool(self._offset(leaf) == end < chunk_end)

    def _offset(self, leaf: int) -> int:
        """Return where in the arena a leaf's image lies; nobody else keeps it: it may move."""
        return int(self._binding.arena_offset(leaf))

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor's bytes lie in the arena."""
        begin = int(self.arena.address)
        return tensor.device.type == "cpu" and (
            begin <= tensor.data_ptr() < begin + int(self.arena.bytes)
        )

    def arrange(self, order: Sequence[int]) -> None:
        """Lay images out in the order in which they run, where that takes little room.

        A group of neighbours that runs together, only in another order, is moved through scratch
        memory. A leaf whose image somebody else holds tensors over stays where it is.
        """
        runs_at = {leaf: position for position, leaf in enumerate(order)}
        ranked = sorted(runs_at, key=self._offset)
        groups = []
        begin = 0
        while begin < len(ranked):
            end, furthest = begin, runs_at[ranked[begin]]
            while end < furthest:
                end += 1
                furthest = max(furthest, runs_at[ranked[end]])
            group = ranked[begin : end + 1]
            if len(group) > 1 and self._may_move(group):
                groups.append(self._moves(sorted(group, key=runs_at.__getitem__)))
            begin = end + 1
        if groups:
            self.arrangement += 1  # first: whatever breaks the next line off
            self._binding.rearrange(self.arena, groups)

    def _may_move(self, group: Sequence[int]) -> bool:
        contiguous = all(self.follows(b, a) for a, b in itertools.pairwise(group))
        return contiguous and sum(map(self.image_bytes.__getitem__, group)) <= MAX_SCRATCH_BYTES

    def _moves(self, group: Sequence[int]) -> list[tuple[int, int]]:
        """Return each leaf's new offset, in this order from where the first of them lies now."""
        offset = min(map(self._offset, group))
        ends = itertools.accumulate((self.image_bytes[leaf] for leaf in group), initial=offset)
        return list(zip(group, ends, strict=False))
