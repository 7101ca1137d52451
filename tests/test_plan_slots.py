"""Slots in the ring: those of a plan, those for given residents, and the check of both."""

import pytest
from checked_plans import planned, streamed
from plan_reference import PieceList, random_list
from plan_requests import LINK, MIB, measured, measured_request, request_of

from blockswap import _C
from blockswap.errors import ConfigError


def test_slots_are_the_same_each_step_and_wrap_without_a_gap():
    size = 64 * MIB
    request = request_of(
        PieceList([size] * 12, [1e-4] * 12, 12 * size // 2, 55e9), offload_bytes=12 * size
    )
    plan = planned(request)
    slots = plan.ring_bytes // size
    assert 12 % slots == 0
    for k, piece in enumerate(plan.pieces):
        assert piece.after == (k - slots) % 12


@pytest.mark.parametrize("ring", [314_634_240, 330_000_000, 350_000_000])
def test_in_a_ring_of_few_pieces_no_large_one_waits_for_the_one_right_before_it(ring):
    """Wan, all streamed through a ring of its largest leaf: laps cut anyhow cost 34 to 58 ms."""
    leaves = [("condition_embedder.time_proj", 314_634_240, 1e-4), *measured("wan")]
    sizes = [size for _, size, _ in leaves]
    seconds = [s for *_, s in leaves]
    request = request_of(
        PieceList(sizes, seconds, -1, LINK), offload_bytes=sum(sizes), ring_bytes=ring
    )
    plan = planned(request)
    assert plan.streamed_bytes == sum(sizes)
    assert plan.predicted_seconds <= sum(seconds) + 10e-3


def test_assign_slots_keeps_the_residents_and_the_ring_it_is_given():
    request = measured_request("flux", 0.5)
    plan = planned(request)
    pieces = plan.pieces
    shed = [
        i for i, piece in enumerate(pieces) if piece.resident and piece.bytes <= plan.ring_bytes
    ][:3]
    for i in shed:
        pieces[i].resident = False
    plan.pieces = pieces
    ring = plan.ring_bytes
    _C.assign_slots(plan, request)
    assert plan.ring_bytes == ring
    assert all(plan.pieces[i].slot_offset >= 0 for i in shed)
    _C.validate(plan, request)


def test_assign_slots_refuses_a_piece_larger_than_the_ring():
    request = request_of(PieceList([256 * 10, 256 * 20], [1e-3] * 2, -1, 1e9))
    pieces = [
        _C.Piece(first_leaf=0, end_leaf=1, bytes=2560),
        _C.Piece(first_leaf=1, end_leaf=2, bytes=5120),
    ]
    plan = _C.Plan(pieces=pieces, ring_bytes=4096)
    with pytest.raises(ConfigError, match="5120 bytes"):
        _C.assign_slots(plan, request)


def broken(change):
    request = request_of(random_list(3, 12, 14), offload_bytes=1)
    plan = planned(request)
    pieces = plan.pieces
    change(plan, pieces, streamed(plan))
    plan.pieces = pieces
    return plan, request


def overlap_neighbours(plan, pieces, order):
    """The second of two neighbours moves onto the first, waiting only for itself."""
    pieces[order[1]].slot_offset = pieces[order[0]].slot_offset
    pieces[order[1]].after = order[1]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (overlap_neighbours, "overwrite piece|outside the ring"),
        (lambda plan, ps, o: setattr(ps[o[0]], "slot_offset", plan.ring_bytes), "outside the ring"),
        (lambda plan, ps, o: setattr(ps[o[0]], "slot_offset", 128), "not aligned"),
        (lambda plan, ps, o: setattr(ps[o[0]], "after", -1), "no slot"),
        (lambda plan, ps, o: setattr(ps[o[0]], "resident", True), "resident but has a slot"),
        (lambda plan, ps, o: setattr(ps[1], "first_leaf", 2), "missing or twice"),
        (lambda plan, ps, o: ps.pop(), "in no piece"),
        (lambda plan, ps, o: setattr(ps[0], "bytes", 256), "its leaves have"),
        (lambda plan, ps, o: setattr(plan, "streamed_bytes", 1), "streamed bytes"),
        (lambda plan, ps, o: setattr(plan, "ring_bytes", 2**60), "budget"),
        (lambda plan, ps, o: setattr(plan, "copy_on_compute", True), "compute stream"),
    ],
)
def test_validate_names_what_is_wrong(change, match):
    plan, request = broken(change)
    with pytest.raises(ConfigError, match=match):
        _C.validate(plan, request)


def test_validate_refuses_a_fetch_that_would_overwrite_a_piece_not_yet_run():
    request = measured_request("flux", 0.2)
    plan = planned(request)
    order = streamed(plan)
    pieces = plan.pieces
    early = 0
    for at, k in enumerate(order):
        if pieces[k].after == order[at - 2]:
            continue
        pieces[k].after = order[at - len(order) + 1] if at + 1 < len(order) else order[0]
        plan.pieces = pieces
        early += 1
        with pytest.raises(ConfigError, match=f"piece {k} .* would overwrite piece"):
            _C.validate(plan, request)
        plan = planned(request)
        pieces = plan.pieces
        if early == 5:
            break
    assert early == 5
