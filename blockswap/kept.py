"""What a plan keeps on the device, beside another one of the same leaves. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from blockswap import _C


def are_alike(one: _C.Plan, other: _C.Plan | None) -> bool:
    """Whether two plans keep and stream the same."""
    if other is None or one.ring_bytes != other.ring_bytes:
        return False
    pieces = (
        [(p.first_leaf, p.end_leaf, p.resident) for p in plan.pieces] for plan in (one, other)
    )
    return next(pieces) == next(pieces)


def missing_bytes(plan: _C.Plan, installed: _C.Plan, bytes_of_leaf: Sequence[int]) -> int:
    """Return the bytes that a plan keeps, ring included, and the installed one does not.

    Args:
        plan: would be installed.
        installed: of the same leaves in the same order.
        bytes_of_leaf: in that order.
    """
    missing = _resident_leaves(plan) - _resident_leaves(installed)
    return int(plan.ring_bytes) + sum(bytes_of_leaf[leaf] for leaf in missing)


def is_one_run(plan: _C.Plan, order: Sequence[int], follows: Callable[[int, int], bool]) -> bool:
    """Whether the images of each streamed piece lie behind each other: one copy takes them.

    Args:
        plan: of the leaves in this order.
        order: leaf numbers.
        follows: whether one leaf's image lies right behind another's.
    """
    return all(
        follows(order[leaf], order[leaf - 1])
        for piece in plan.pieces
        if not piece.resident
        for leaf in range(piece.first_leaf + 1, piece.end_leaf)
    )


def _resident_leaves(plan: _C.Plan) -> set[int]:
    """Return the positions of what a plan keeps."""
    kept = (piece for piece in plan.pieces if piece.resident)
    return {leaf for piece in kept for leaf in range(piece.first_leaf, piece.end_leaf)}
