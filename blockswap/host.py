"""The host's side of the weights: one arena that holds every image, exactly once."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from blockswap import _C
from blockswap.progress import progress

# A piece never crosses a chunk: large ones cost few cuts, small ones let pinning overlap copying.
CHUNK_BYTES = 2**30
# Images may be laid out anew in the order in which they run, this many bytes at a time.
MAX_SCRATCH_BYTES = 512 * 2**20


class Host:
    """Owns the arena; knows where each leaf's image lies in it.

    Leaf numbers are the binding's; the last one may be the group of small parameters.
    """

    def __init__(self, binding: _C.Binding, device: _C.Device, num_leaves: int) -> None:
        self._binding = binding
        self._device = device
        self.image_bytes = [binding.leaf_bytes(leaf) for leaf in range(num_leaves)]
        offsets, chunks, total = _C.HostArena.make_layout(self.image_bytes, CHUNK_BYTES)
        self.offsets: list[int] = offsets
        self.arena = _C.HostArena(total, chunks)

    def take(self, num_entries: int) -> None:
        """Move all parameters in; each original is let go as soon as its image is complete.

        Interrupted or failing, each parameter has either its original or its image, both whole.
        """
        for leaf, offset in enumerate(self.offsets):
            self._binding.place_host(leaf, self.arena, offset)
        with progress("moving weights to pinned memory", self.arena.bytes) as tick:

            def show(done: int) -> bool:
                tick(done)
                return True

            self._binding.fill(self.arena, 0, show, self._device)
            self.arena.pin(self._device)
            done = 0
            for entry in range(num_entries):  # what did not lie in CPU memory
                if not self._binding.is_adopted(entry):
                    self._binding.adopt(entry)
                    done += self._binding.host(entry).nbytes
                    tick(done)
        self._binding.settle()

    def address(self, leaf: int) -> int:
        """Return the host address of a leaf's image."""
        return int(self.arena.address) + self.offsets[leaf]

    def follows(self, leaf: int, before: int) -> bool:
        """Whether ``leaf``'s image lies right behind ``before``'s, so that one copy takes both."""
        end = self.offsets[before] + self.image_bytes[before]
        chunk_end = int(self.arena.chunk_end(self.offsets[before]))
        return bool(self.offsets[leaf] == end and chunk_end > end)

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
        ranked = sorted(runs_at, key=self.offsets.__getitem__)
        begin = 0
        while begin < len(ranked):
            end, furthest = begin, runs_at[ranked[begin]]
            while end < furthest:
                end += 1
                furthest = max(furthest, runs_at[ranked[end]])
            group = ranked[begin : end + 1]
            if len(group) > 1 and self._may_move(group):
                self._move(sorted(group, key=runs_at.__getitem__))
            begin = end + 1

    def _may_move(self, group: Sequence[int]) -> bool:
        contiguous = all(self.follows(b, a) for a, b in itertools.pairwise(group))
        small = sum(self.image_bytes[leaf] for leaf in group) <= MAX_SCRATCH_BYTES
        return contiguous and small and all(self._binding.is_movable(leaf) for leaf in group)

    def _move(self, group: Sequence[int]) -> None:
        offset = min(self.offsets[leaf] for leaf in group)
        moves: list[tuple[int, int]] = []
        for leaf in group:
            moves.append((leaf, offset))
            self.offsets[leaf] = offset
            offset += self.image_bytes[leaf]
        self._binding.rearrange(self.arena, moves)
