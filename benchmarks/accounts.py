"""Whether a caching pool's figures are what the process really holds."""

from __future__ import annotations

import gc
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

ROUNDED_TO = 512  # csrc/device/heap.h


@dataclass(frozen=True)
class Block:
    """A range of device memory."""

    address: int
    bytes: int


@dataclass(frozen=True)
class Account:
    """One pool's figures beside what others say, in bytes.

    Attributes:
        allocated: in use, as the pool counts.
        reserved: mapped, as the pool counts.
        blocks: in use, block by block.
        num_blocks: how many.
        tensors: the storages of live tensors that lie in such blocks, or PyTorch's segments there.
        sessions: what sessions hold in such blocks.
        driver: by how much the device has less free memory than before the first allocation.
    """

    allocated: int
    reserved: int
    blocks: int
    num_blocks: int
    tensors: int
    sessions: int
    driver: int

    @property
    def others(self) -> int:
        """Return what lies in blocks of neither."""
        return self.allocated - self.tensors - self.sessions

    @property
    def is_balanced(self) -> bool:
        """Whether each byte is someone's: what is nobody's, sizes were rounded up by."""
        return (
            self.blocks == self.allocated
            and 0 <= self.others < self.num_blocks * ROUNDED_TO
            and self.allocated <= self.reserved <= self.driver
        )


def blocks_in_use(snapshot: Mapping[str, Any]) -> list[Block]:
    """Return a snapshot's blocks that hold something, by address."""
    return sorted(
        (
            Block(block["address"], block["size"])
            for segment in snapshot["segments"]
            for block in segment["blocks"]
            if block["state"] == "active_allocated"
        ),
        key=lambda block: block.address,
    )


def bytes_inside(parts: Sequence[Block], blocks: Sequence[Block]) -> int:
    """Return the bytes of those parts that lie in one of the blocks, which are in order."""
    begins = [block.address for block in blocks]

    def is_inside(part: Block) -> bool:
        at = bisect_right(begins, part.address) - 1
        if at < 0:
            return False
        return part.address + part.bytes <= blocks[at].address + blocks[at].bytes

    return sum(part.bytes for part in parts if is_inside(part))


def live_blocks() -> list[Block]:
    """Return the storages of all GPU tensors that Python knows, each once."""
    found: dict[int, int] = {}
    for thing in gc.get_objects():
        # Of the type, since what imports lazily may answer to isinstance().
        if issubclass(type(thing), torch.Tensor) and thing.is_cuda:
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return [Block(address, size) for address, size in found.items() if size]
