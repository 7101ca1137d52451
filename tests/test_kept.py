"""What a plan keeps that another one does not: the price of moving from that to this."""

from __future__ import annotations

import pytest
from plan_requests import measured_request

from blockswap import _C
from blockswap.kept import are_alike, is_one_run, missing_bytes


@pytest.mark.parametrize("keeps", [(), (0, 2), (0, 1, 2)])
def test_beside_a_plan_that_keeps_nothing_all_residents_and_the_ring_are_missing(
    keeps: tuple[int, ...],
) -> None:
    bytes_of_leaf = [100, 20, 3]
    plan, nothing = keeping(keeps), keeping(())
    residents = sum(bytes_of_leaf[leaf] for leaf in keeps)
    assert missing_bytes(plan, nothing, bytes_of_leaf) == plan.ring_bytes + residents
    assert missing_bytes(plan, plan, bytes_of_leaf) == plan.ring_bytes
    assert missing_bytes(nothing, plan, bytes_of_leaf) == plan.ring_bytes


def keeping(kept: tuple[int, ...]) -> _C.Plan:
    pieces = [
        _C.Piece(first_leaf=leaf, end_leaf=leaf + 1, resident=leaf in kept) for leaf in range(3)
    ]
    return _C.Plan(pieces=pieces, ring_bytes=4096)


def test_plans_are_alike_that_keep_and_stream_the_same() -> None:
    request = measured_request("flux", 0.3)
    plan = _C.make_plan(request)
    assert are_alike(plan, _C.make_plan(request)) and not are_alike(plan, None)
    assert not are_alike(plan, _C.make_plan(measured_request("flux", 0.4)))


def test_plans_whose_rings_or_residents_differ_are_not_alike() -> None:
    plan = keeping((0, 2))
    assert not are_alike(plan, keeping((0, 1)))
    larger = keeping((0, 2))
    larger.ring_bytes += 256
    assert not are_alike(plan, larger)


def test_a_streamed_piece_is_one_run_of_images_until_others_lie_between_them() -> None:
    pieces = [_C.Piece(first_leaf=0, end_leaf=2), _C.Piece(first_leaf=2, end_leaf=4, resident=True)]
    plan = _C.Plan(pieces=pieces)
    assert is_one_run(plan, [3, 4, 0, 9], lambda leaf, before: leaf == before + 1)
    assert not is_one_run(plan, [3, 5, 0, 1], lambda leaf, before: leaf == before + 1)
