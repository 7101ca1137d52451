"""The planner: what the wishes of a request mean, and what is refused."""

from itertools import pairwise

import pytest
from checked_plans import planned, streamed
from plan_reference import PieceList
from plan_requests import MIB, measured_request, request_of

from blockswap import _C
from blockswap.errors import CapError, ConfigError

GIB = 2**30


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
