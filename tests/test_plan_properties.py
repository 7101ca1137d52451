"""What holds for every plan, whatever was asked: ranges, budget, priorities, prediction."""

import pytest
from checked_plans import streamed
from hypothesis import assume, given, settings
from plan_reference import overlap, replay
from plan_requests import any_request

from blockswap import _C
from blockswap.errors import ConfigError


def possible(request):
    """The plan, or None where the request contradicts itself or does not fit."""
    try:
        return _C.make_plan(request)
    except ConfigError:
        return None


pytestmark = pytest.mark.timeout(900)  # some hundred plans each: minutes on a busy machine


@settings(max_examples=300, deadline=None)
@given(any_request())
def test_no_range_is_refilled_before_its_piece_ran(request_):
    plan = possible(request_)
    assume(plan is not None)
    seen = replay(plan, request_, steps=4)
    live = [
        (seen.copy_begin[key], seen.released[key], key)
        for key in seen.copy_begin
        if key in seen.released
    ]
    for begin, end, key in live:
        for other_begin, other_end, other in live:
            if key < other and begin < other_end - 1e-12 and other_begin < end - 1e-12:
                a, b = plan.pieces[key[1]], plan.pieces[other[1]]
                assert not overlap(a, b), f"{key} {a} and {other} {b} are live at the same time"


@settings(max_examples=300, deadline=None)
@given(any_request())
def test_every_leaf_is_in_exactly_one_piece_and_the_bytes_add_up(request_):
    plan = possible(request_)
    assume(plan is not None)
    _C.validate(plan, request_)
    leaves = [leaf for piece in plan.pieces for leaf in range(piece.first_leaf, piece.end_leaf)]
    assert leaves == list(range(len(request_.leaves)))
    for piece in plan.pieces:
        inside = request_.leaves[piece.first_leaf : piece.end_leaf]
        assert piece.bytes == sum(leaf.bytes for leaf in inside)
        assert piece.seconds == pytest.approx(sum(leaf.seconds for leaf in inside))
        assert len(inside) == 1 or piece.bytes <= plan.piece_bytes
    assert plan.resident_bytes == sum(p.bytes for p in plan.pieces if p.resident)
    assert plan.streamed_bytes == sum(p.bytes for p in plan.pieces if not p.resident)


@settings(max_examples=300, deadline=None)
@given(any_request())
def test_residents_and_ring_stay_within_the_budget(request_):
    plan = possible(request_)
    assume(plan is not None)
    if request_.budget_bytes >= 0:
        assert plan.resident_bytes + plan.ring_bytes <= request_.budget_bytes
    for piece in plan.pieces:
        if not piece.resident:
            assert piece.slot_offset % _C.ALIGNMENT == 0
            assert piece.slot_offset >= 0
            assert piece.slot_offset + piece.bytes <= plan.ring_bytes
    if request_.ring_bytes and plan.streamed_bytes:
        assert plan.ring_bytes == request_.ring_bytes


@settings(max_examples=200, deadline=None)
@given(any_request())
def test_pinned_leaves_never_stream(request_):
    plan = possible(request_)
    assume(plan is not None)
    for piece in plan.pieces:
        pins = {
            leaf.priority == _C.PINNED
            for leaf in request_.leaves[piece.first_leaf : piece.end_leaf]
        }
        assert len(pins) == 1
        assert piece.resident or pins == {False}


@settings(max_examples=200, deadline=None)
@given(any_request())
def test_a_lower_priority_streams_before_a_higher_one(request_):
    plan = possible(request_)
    assume(plan is not None and not request_.offload_blocks)
    given_ = [
        (request_.leaves[p.first_leaf].priority, p.resident)
        for p in plan.pieces
        if request_.leaves[p.first_leaf].priority != _C.NO_PRIORITY
    ]
    lowest_resident = min((p for p, resident in given_ if resident), default=_C.PINNED)
    highest_streamed = max((p for p, resident in given_ if not resident), default=-1)
    assert highest_streamed <= lowest_resident


@settings(max_examples=200, deadline=None)
@given(any_request())
def test_no_resident_could_be_added_under_the_budget(request_):
    plan = possible(request_)
    assume(plan is not None and request_.budget_bytes >= 0)
    assume(not request_.offload_blocks and plan.streamed_bytes)
    left = request_.budget_bytes - plan.resident_bytes - plan.ring_bytes
    level = {_C.NO_PRIORITY: 0.5}
    out = [
        (level.get(p, p), plan.pieces[i].bytes)
        for i in streamed(plan)
        for p in [request_.leaves[plan.pieces[i].first_leaf].priority]
    ]
    top = max(level for level, _ in out)
    for priority, size in out:
        if priority == top:
            assert size > left or plan.streamed_bytes - size < request_.offload_bytes


@settings(max_examples=200, deadline=None)
@given(any_request())
def test_offloaded_bytes_reach_the_wish_and_pass_it_by_less_than_a_piece(request_):
    plan = possible(request_)
    assume(plan is not None and request_.offload_bytes > 0)
    assert plan.streamed_bytes >= request_.offload_bytes
    prioritised = any(leaf.priority != _C.NO_PRIORITY for leaf in request_.leaves)
    if request_.budget_bytes < 0 and not prioritised:
        smallest = min(plan.pieces[i].bytes for i in streamed(plan))
        assert plan.streamed_bytes - smallest < request_.offload_bytes


@settings(max_examples=200, deadline=None)
@given(any_request())
def test_no_fetch_starts_more_than_lookahead_blocks_ahead(request_):
    plan = possible(request_)
    assume(plan is not None and request_.lookahead > 0)
    blocks = [leaf.block for leaf in request_.leaves]
    n, num_blocks = len(plan.pieces), blocks[-1] + 1
    order = streamed(plan)
    for at, k in enumerate(order):
        waited = plan.pieces[k].after
        allowed = blocks[plan.pieces[k].first_leaf] - request_.lookahead
        for back in range(1, len(order) + 1):
            j = order[at - back]
            if j == waited:
                break
            ended = blocks[plan.pieces[j].end_leaf - 1] - (num_blocks if back > at else 0)
            assert ended >= allowed, f"piece {k} of {n} is fetched before piece {j} was released"


@settings(max_examples=100, deadline=None)
@given(any_request())
def test_the_same_request_gives_the_same_plan(request_):
    first, second = possible(request_), possible(request_)
    assume(first is not None)
    fields = ("first_leaf", "end_leaf", "resident", "slot_offset", "after")
    assert [[getattr(p, f) for f in fields] for p in first.pieces] == [
        [getattr(p, f) for f in fields] for p in second.pieces
    ]


@settings(max_examples=200, deadline=None)
@given(any_request())
def test_the_prediction_is_the_simulation_and_never_beats_the_bound(request_):
    plan = possible(request_)
    assume(plan is not None)
    assert plan.predicted_seconds == _C.simulate(plan, request_).step_seconds
    assert plan.predicted_seconds >= plan.bound_seconds * (1 - 1e-12)
    assert plan.reason
    assert plan.reason in _C.explain(plan, request_)
