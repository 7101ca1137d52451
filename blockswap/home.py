"""Where a component's weights lie while it is not on the device: host memory that is pinned."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable

import torch
from torch import nn

from blockswap import _C


class Home:
    """Pinned memory that tensors move into; they stay the same objects.

    From memory that is not pinned the link carries a fraction of what it can: `blockswap probe`.
    The memory lives as long as any of them lies in it.

    Args:
        tensors: those that lie in CPU memory and fill theirs move; others stay as they are, and so
            do pinned ones.
        device: where they come to; if its driver refuses to pin, as slowly as before.
    """

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def __init__(self, tensors: Iterable[torch.Tensor], device: torch.device) -> None:
        movable = _apart([tensor for tensor in tensors if _is_plain(tensor)])
        layout = _C.HostArena.make_layout([tensor.nbytes for tensor in movable])
        offsets, chunks, total = layout
        self.arena = _C.HostArena(total, chunks)
        memory = (ctypes.c_uint8 * max(1, total)).from_address(self.arena.address)
        memory.arena = self.arena  # kept by every tensor over it
        self._rooms: dict[torch.Tensor, torch.Tensor] = {}
        for tensor, offset in zip(movable, offsets, strict=True):
            flat = torch.frombuffer(memory, dtype=torch.uint8, count=tensor.nbytes, offset=offset)
            room = flat.view(tensor.dtype).as_strided(tensor.size(), tensor.stride())
            room.copy_(tensor.detach())
            _C.set_data(tensor, room)
            self._rooms[tensor] = room
        self.arena.pin(_C.Pinner(_C.make_device(device.type, device.index or 0)))

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor in host memory lies here, and is pinned."""
        begin, total = int(self.arena.address), int(self.arena.bytes)
        is_inside = begin <= tensor.data_ptr() < begin + total
        return is_inside and self.arena.pinned_bytes == total

    def room_for(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """Return where a tensor lay here, if it would fill the place as it did."""
        room = self._rooms.get(tensor)
        if room is None or (room.dtype, room.shape) != (tensor.dtype, tensor.shape):
            return None
        return room if room.stride() == tensor.stride() else None

    def unpin(self) -> None:
        """Leave ordinary memory behind."""
        self.arena.unpin()


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor is nothing but its bytes, without gaps, in CPU memory."""
    is_ordinary = type(tensor) in (torch.Tensor, nn.Parameter) and tensor.layout is torch.strided
    if not is_ordinary or tensor.device.type != "cpu" or tensor.nbytes == 0 or tensor.is_pinned():
        return False
    is_lazy = tensor.is_conj() or tensor.is_neg() or tensor.is_quantized
    dense = torch.empty_like(tensor, device="meta")
    return not is_lazy and dense.stride() == tensor.stride()


def _apart(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return those that share no byte with another one: tied weights stay tied."""
    ranked = sorted(tensors, key=lambda tensor: tensor.data_ptr())
    tied: set[int] = set()
    furthest: torch.Tensor | None = None
    for tensor in ranked:
        if furthest is not None and tensor.data_ptr() < _end(furthest):
            tied |= {id(tensor), id(furthest)}
        if furthest is None or _end(tensor) > _end(furthest):
            furthest = tensor
    return [tensor for tensor in tensors if id(tensor) not in tied]


def _end(tensor: torch.Tensor) -> int:
    return tensor.data_ptr() + tensor.nbytes
