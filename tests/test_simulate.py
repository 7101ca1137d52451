"""The simulator: what a plan costs, checked against a simulator written apart."""

import random

import pytest
from hypothesis import assume, given, settings
from plan_reference import PieceList, random_list, replay
from plan_requests import any_request, measured_request, request_of

from blockswap import _C
from blockswap.errors import ConfigError


def two_pieces(copy_seconds: float, run_seconds: float, ring_pieces: int):
    """Two streamed pieces of equal size on a link without cost per copy."""
    size = 1_000_000 * 256
    pieces = PieceList([size, size], [run_seconds, run_seconds], -1, size / copy_seconds, 0.0)
    request = request_of(pieces, offload_bytes=2 * size, ring_bytes=ring_pieces * size)
    return _C.make_plan(request), request


def test_copies_hide_behind_longer_compute():
    plan, request = two_pieces(copy_seconds=1.0, run_seconds=3.0, ring_pieces=2)
    simulation = _C.simulate(plan, request)
    assert simulation.step_seconds == pytest.approx(6.0)
    assert simulation.stall_seconds == pytest.approx(0.0, abs=1e-9)
    assert simulation.link_busy_seconds == pytest.approx(2.0)


def test_a_ring_of_one_slot_copies_and_computes_in_turn():
    plan, request = two_pieces(copy_seconds=1.0, run_seconds=3.0, ring_pieces=1)
    simulation = _C.simulate(plan, request)
    assert simulation.step_seconds == pytest.approx(8.0)
    assert [piece.stall_seconds for piece in simulation.pieces] == pytest.approx([1.0, 1.0])


def test_a_slot_is_free_before_the_tail_of_its_last_user():
    plan, request = two_pieces(copy_seconds=1.0, run_seconds=3.0, ring_pieces=1)
    leaves = request.leaves
    for leaf in leaves:
        leaf.tail_seconds = 0.4
    request.leaves = leaves
    _C.predict(plan, request)  # 0.4 s of each copy hide behind the tail before it
    assert plan.predicted_seconds == pytest.approx(8.0 - 2 * 0.4)
    assert plan.compute_seconds == pytest.approx(6.0)


def test_the_link_bounds_the_step_when_copies_take_longer():
    plan, request = two_pieces(copy_seconds=3.0, run_seconds=1.0, ring_pieces=2)
    assert _C.simulate(plan, request).step_seconds == pytest.approx(6.0)


def test_copies_fetched_ahead_begin_before_their_step():
    plan, request = two_pieces(copy_seconds=1.0, run_seconds=3.0, ring_pieces=2)
    assert min(piece.copy_begin for piece in _C.simulate(plan, request).pieces) < 0.0


def test_residents_are_never_copied_and_never_wait():
    plan = _C.make_plan(measured_request("flux", 0.5))
    simulation = _C.simulate(plan, measured_request("flux", 0.5))
    for piece, seen in zip(plan.pieces, simulation.pieces, strict=True):
        if piece.resident:
            assert (seen.copy_begin, seen.copy_end, seen.stall_seconds) == (0.0, 0.0, 0.0)


def test_stall_is_what_the_step_takes_longer_than_compute():
    request = measured_request("sdxl", 0.2, head_seconds=1e-3)
    plan = _C.make_plan(request)
    simulation = _C.simulate(plan, request)
    assert simulation.stall_seconds == pytest.approx(
        simulation.step_seconds - plan.compute_seconds, rel=1e-6
    )


def test_head_seconds_precede_the_first_piece():
    request = measured_request("flux", 1.0, head_seconds=0.25)
    simulation = _C.simulate(_C.make_plan(request), request)
    assert simulation.pieces[0].run_begin == pytest.approx(0.25)


def test_a_host_slower_than_the_device_bounds_the_step():
    request = measured_request("flux", 0.9, host_seconds=0.5)
    plan = _C.make_plan(request)
    assert plan.predicted_seconds == _C.simulate(plan, request).step_seconds
    assert plan.predicted_seconds == pytest.approx(0.5)


def test_a_link_without_speed_is_refused():
    request = measured_request("flux", 0.5)
    plan = _C.make_plan(request)
    request.link = _C.Link(bytes_per_second=0.0)
    with pytest.raises(ConfigError, match="bytes per second"):
        _C.simulate(plan, request)


def test_lookahead_0_adds_every_copy_to_the_compute():
    request = measured_request("sdxl", 0.5, lookahead=0)
    plan = _C.make_plan(request)
    simulation = _C.simulate(plan, request)
    assert plan.copy_on_compute
    assert simulation.step_seconds == pytest.approx(
        plan.compute_seconds + simulation.link_busy_seconds
    )


@settings(max_examples=150, deadline=None)
@given(any_request(max_leaves=24))
def test_simulation_equals_an_event_simulation_written_apart(request_):
    try:
        plan = _C.make_plan(request_)
    except ConfigError:
        assume(False)
    simulation = _C.simulate(plan, request_)
    apart = replay(plan, request_)
    expected = max(apart.step_seconds, simulation.link_busy_seconds)
    assert simulation.step_seconds == pytest.approx(expected, rel=1e-3, abs=1e-12)
    # Tools that read only the slots see no later start than the fetch dependencies allow.
    if request_.lookahead < 0:
        ideal = replay(plan, request_, honour_after=False)
        assert ideal.step_seconds == pytest.approx(apart.step_seconds, rel=1e-9)


@pytest.mark.parametrize("seed", range(25))
def test_simulated_times_of_each_piece_equal_those_of_an_event_simulation(seed):
    request = request_of(random_list(seed, 3, 30))
    plan = _C.make_plan(request)
    simulation = _C.simulate(plan, request)
    steps = 70
    apart = replay(plan, request, steps=steps)
    last = steps - 1
    begin = apart.run_end[last - 1, len(plan.pieces) - 1]
    if apart.step_seconds != pytest.approx(apart.run_end[last, len(plan.pieces) - 1] - begin):
        pytest.skip("the step time alternates: no single last step to compare")
    for i, seen in enumerate(simulation.pieces):
        where = f"piece {i} of {plan.pieces[i]}"
        assert seen.run_begin == pytest.approx(apart.run_begin[last, i] - begin, abs=1e-7), where
        assert seen.run_end == pytest.approx(apart.run_end[last, i] - begin, abs=1e-7), where


def test_a_faster_link_never_makes_the_same_plan_slower():
    rng = random.Random(1)
    for seed in range(40):
        request = request_of(random_list(seed, 3, 40))
        plan = _C.make_plan(request)
        slow = _C.simulate(plan, request).step_seconds
        request.link = _C.Link(
            bytes_per_second=request.link.bytes_per_second * rng.uniform(1.0, 4.0)
        )
        assert _C.simulate(plan, request).step_seconds <= slow * (1 + 1e-9)
