"""What is given up, rung by rung, where PyTorch finds no memory for activations. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from blockswap.sizes import format_bytes


class Rung(Enum):
    """One thing to give up; behind all but the first, the next step streams everything."""

    NEIGHBOURS = "neighbours"  # what other components keep on the device under the same cap
    SHED = "shed"  # residents
    RING = "ring"  # a ring of more than the largest leaf
    LAYERWISE = "layerwise"  # weights outside the blocks: they stream, too


@dataclass(frozen=True)
class Holding:
    """What could be given up, in bytes.

    Attributes:
        residents: leaves that stay.
        ring: what the others pass through.
        smallest_ring: the largest leaf.
        outside: weights and buffers outside the blocks that do not stream yet.
        neighbours: what other components under the same cap keep on the device.
    """

    residents: int
    ring: int
    smallest_ring: int
    outside: int
    neighbours: int = 0


def next_rung(held: Holding) -> Rung | None:
    """Return what to give up next; None: nothing is left."""
    if held.neighbours:
        return Rung.NEIGHBOURS
    if held.residents:
        return Rung.SHED
    if held.ring > held.smallest_ring:
        return Rung.RING
    return Rung.LAYERWISE if held.outside else None


def tell(rung: Rung | None, held: Holding, repeats: bool) -> str:
    """Return what to say of it.

    Args:
        rung: what is given up.
        held: what there was.
        repeats: the forward runs again now; else it has failed.
    """
    if rung is None:
        return (
            f"blockswap holds {format_bytes(held.ring)} for its smallest ring, and"
            f" {format_bytes(held.outside)} outside the blocks: nothing is left to give back. Make"
            " the input smaller, decode in tiles, raise vram, free memory that other programs"
            " hold, or have PyTorch leave less between its tensors: set"
            " PYTORCH_ALLOC_CONF=expandable_segments:True before Python starts"
        )
    what = {
        Rung.NEIGHBOURS: f"what other components keep on the device"
        f" ({format_bytes(held.neighbours)})",
        Rung.SHED: f"its residents ({format_bytes(held.residents)})",
        Rung.RING: f"its ring of {format_bytes(held.ring)} for the smallest, of"
        f" {format_bytes(held.smallest_ring)}",
        Rung.LAYERWISE: f"weights outside the blocks (up to {format_bytes(held.outside)})",
    }[rung]
    then = (
        "the forward runs again"
        if repeats
        else "call again; this forward could not be repeated with the same result"
    )
    streams = "" if rung is Rung.NEIGHBOURS else " and streams everything"
    return f"blockswap has given back {what}{streams}: {then}"
