"""The planner: what stays, what streams, through which slot, and what it refuses."""

from itertools import pairwise

import pytest
from hypothesis import assume, given, settings
from plan_reference import PieceList, overlap, random_list, replay
from plan_requests import MIB, any_request, measured_request, request_of

from blockswap import _C
from blockswap.errors import CapError, ConfigError

GIB = 2**30


def planned(request):
    plan = _C.make_plan(request)
    _C.validate(plan, request)
    return plan


def streamed(plan):
    return [i for i, piece in enumerate(plan.pieces) if not piece.resident]


def possible(request):
    """The plan, or None where the request contradicts itself or does not fit."""
    try:
        return _C.make_plan(request)
    except ConfigError:
        return None


# ---- properties of any plan ---------------------------------------------------------------------


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


# ---- what the wishes mean -----------------------------------------------------------------------


def test_without_a_budget_everything_stays():
    request = measured_request("flux", 1.0, budget_bytes=-1)
    plan = planned(request)
    assert streamed(plan) == []
    assert plan.ring_bytes == 0
    assert plan.predicted_seconds == pytest.approx(plan.compute_seconds)


def test_a_budget_that_holds_everything_needs_no_ring():
    request = measured_request("flux", 1.0)
    plan = planned(request)
    assert plan.resident_bytes == request.budget_bytes
    assert plan.ring_bytes == 0


def test_the_smallest_budget_named_in_the_refusal_is_enough():
    with pytest.raises(CapError, match="smallest possible") as refusal:
        _C.make_plan(measured_request("flux", 0.001))
    smallest = int(str(refusal.value).split(" bytes:")[0].split(" ")[-1])
    assert smallest == 113283072
    plan = planned(measured_request("flux", 0.001, budget_bytes=smallest))
    assert plan.ring_bytes == smallest
    with pytest.raises(CapError):
        _C.make_plan(measured_request("flux", 0.001, budget_bytes=smallest - 256))


def test_a_block_size_that_does_not_fit_is_told_which_one_would():
    request = measured_request("flux", 0.01, piece_bytes=512 * MIB)
    with pytest.raises(CapError) as refusal:
        _C.make_plan(request)
    text = str(refusal.value)
    assert "but the cap is 225.8 MiB" in text
    assert "lower block_size to" in text
    assert 'set mode="layerwise"' in text
    planned(measured_request("flux", 0.01, piece_bytes=1))


def test_pinned_bytes_count_in_the_smallest_budget():
    request = request_of(PieceList([256 * 1000] * 4, [1e-3] * 4, 256 * 2000, 1e9))
    leaves = request.leaves
    leaves[0].priority = leaves[1].priority = _C.PINNED
    request.leaves = leaves
    with pytest.raises(CapError, match=f"{256 * 3000} bytes"):
        _C.make_plan(request)


def test_a_ring_below_the_largest_leaf_is_refused_with_that_minimum():
    with pytest.raises(ConfigError, match="113283072 bytes"):
        _C.make_plan(measured_request("flux", 0.5, ring_bytes=100 * MIB))


def test_a_ring_below_the_given_block_size_is_refused_with_both_ways_out():
    request = measured_request("flux", 0.5, ring_bytes=120 * MIB, piece_bytes=300 * MIB)
    with pytest.raises(ConfigError, match=r"enlarge swap_space to .* or lower block_size"):
        _C.make_plan(request)


def test_a_small_given_ring_makes_the_planner_choose_small_pieces():
    request = measured_request("flux", 0.5, ring_bytes=113283072)
    plan = planned(request)
    assert plan.ring_bytes == 113283072
    assert max(plan.pieces[i].bytes for i in streamed(plan)) <= plan.ring_bytes


@pytest.mark.parametrize("count", [0, 1, 7, 19])
def test_a_count_of_blocks_streams_exactly_that_many_whole_blocks(count):
    request = measured_request(
        "flux", 1.0, budget_bytes=-1, offload_blocks=[("transformer_blocks", count)]
    )
    plan = planned(request)
    stays, goes = set(), set()
    for piece in plan.pieces:
        for leaf in request.leaves[piece.first_leaf : piece.end_leaf]:
            (stays if piece.resident else goes).add(leaf.block)
    assert not stays & goes
    assert len(goes) == count
    assert all(request.blocks[b].list == "transformer_blocks" for b in goes)


def test_blocks_that_stream_are_spread_evenly():
    request = measured_request(
        "flux", 1.0, budget_bytes=-1, offload_blocks=[("single_transformer_blocks", 19)]
    )
    plan = planned(request)
    goes = sorted({request.leaves[p.first_leaf].block for p in plan.pieces if not p.resident})
    assert {b - a for a, b in pairwise(goes)} <= {1, 2, 3}
    assert max(b - a for a, b in zip(goes, goes[2:], strict=False)) <= 5


def test_an_empty_list_name_counts_the_blocks_of_all_lists():
    request = measured_request("flux", 1.0, budget_bytes=-1, offload_blocks=[("", 57)])
    assert planned(request).resident_bytes == 0


def test_prioritised_blocks_stream_first():
    request = measured_request(
        "flux", 1.0, budget_bytes=-1, offload_blocks=[("transformer_blocks", 2)]
    )
    leaves = request.leaves
    for leaf in leaves:
        if leaf.block in (3, 4):
            leaf.priority = 0
    request.leaves = leaves
    plan = planned(request)
    assert {request.leaves[p.first_leaf].block for p in plan.pieces if not p.resident} == {3, 4}


def test_a_count_beyond_the_list_names_the_allowed_range():
    with pytest.raises(ConfigError, match=r"0\.\.19"):
        _C.make_plan(measured_request("flux", 1.0, offload_blocks=[("transformer_blocks", 20)]))


def test_an_unknown_list_names_the_lists_there_are():
    with pytest.raises(ConfigError, match="single_transformer_blocks, transformer_blocks"):
        _C.make_plan(measured_request("flux", 1.0, offload_blocks=[("up_blocks", 2)]))


def test_a_count_of_blocks_that_does_not_hold_the_budget_names_both_numbers():
    request = measured_request("flux", 0.5, offload_blocks=[("transformer_blocks", 2)])
    with pytest.raises(CapError, match=r"needs 20\.\d\d GiB.* but the cap is 11\.02 GiB"):
        _C.make_plan(request)


def test_offloading_more_than_there_is_names_what_there_is():
    request = measured_request("flux", 1.0, budget_bytes=-1, offload_bytes=23 * GIB)
    with pytest.raises(ConfigError, match=r"only 22\.05 GiB"):
        _C.make_plan(request)


def test_more_memory_is_left_alone_when_offload_asks_for_it():
    request = measured_request("flux", 0.9, offload_bytes=8 * GIB)
    plan = planned(request)
    assert 8 * GIB <= plan.streamed_bytes < 8 * GIB + 200 * MIB
    assert plan.resident_bytes + plan.ring_bytes < request.budget_bytes


def test_a_higher_priority_is_kept_as_long_as_anything_else_can_stream():
    request = measured_request("flux", 0.3)
    leaves = request.leaves
    for leaf in leaves:
        if leaf.block in (0, 1):
            leaf.priority = 5
    request.leaves = leaves
    plan = planned(request)
    kept = [p for p in plan.pieces if request.leaves[p.first_leaf].priority == 5]
    assert kept
    assert all(p.resident for p in kept)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda r: setattr(r, "link", _C.Link(bytes_per_second=0.0)), "link"),
        (lambda r: setattr(r, "head_seconds", -1.0), "head"),
        (lambda r: setattr(r, "ring_bytes", -1), "negative"),
        (
            lambda r: setattr(r, "leaves", [_C.Leaf(name="x", bytes=256, tail_seconds=1.0)]),
            "x has a tail longer",
        ),
        (lambda r: setattr(r, "leaves", [_C.Leaf(name="x", bytes=100)]), "x has 100 bytes"),
        (lambda r: setattr(r, "leaves", [_C.Leaf(name="x", bytes=256, block=99)]), "block 99"),
        (
            lambda r: setattr(r, "leaves", [_C.Leaf(name="x", bytes=256, seconds=-1.0)]),
            "infinite time",
        ),
    ],
)
def test_bad_numbers_are_refused_by_name(change, match):
    request = request_of(PieceList([256] * 3, [1e-3] * 3, 512, 1e9))
    change(request)
    with pytest.raises(ConfigError, match=match):
        _C.make_plan(request)


def test_an_unknown_field_is_a_type_error():
    with pytest.raises(TypeError, match="no field 'size'"):
        _C.Leaf(size=256)


def test_no_leaves_make_an_empty_plan():
    plan = _C.make_plan(_C.PlanRequest(link=_C.Link(bytes_per_second=1e9)))
    assert plan.pieces == []
    assert plan.predicted_seconds == 0.0


def test_explain_names_every_list_and_the_budget():
    request = measured_request("flux", 0.5)
    text = _C.explain(planned(request), request)
    for word in (
        "transformer_blocks",
        "single_transformer_blocks",
        "budget 11.02 GiB",
        "predicted",
        "bound",
    ):
        assert word in text


# ---- slots for given residents, and the check of a plan -----------------------------------------


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
