"""Plans for a host that can hardly issue the work in time."""

import pytest
from plan_requests import measured_request

from blockswap import _C

HOST_S = 52e-3  # as long as SDXL computes: every further copy makes the step longer


def request(share: float, copy_s: float, host_s: float = HOST_S):
    asked = measured_request("sdxl", share)
    leaves = asked.leaves
    for leaf in leaves:
        leaf.host_seconds = host_s / len(leaves)
    asked.leaves = leaves
    asked.host_seconds_per_copy = copy_s
    return asked


def copies(plan) -> int:
    return sum(not piece.resident for piece in plan.pieces)


def test_what_a_copy_costs_the_host_makes_fewer_and_larger_pieces():
    free, dear = (_C.make_plan(request(0.6, copy_s)) for copy_s in (0.0, 30e-6))
    assert copies(dear) < copies(free) / 2
    again = request(0.6, 30e-6)
    _C.predict(free, again)
    assert dear.predicted_seconds < free.predicted_seconds


def test_a_fast_host_changes_nothing_for_a_device_that_sets_the_pace():
    plain, with_host = (_C.make_plan(request(0.2, 0.0, host_s)) for host_s in (0.0, 5e-3))
    assert with_host.predicted_seconds == pytest.approx(plain.predicted_seconds, rel=1e-6)


def test_the_step_is_never_shorter_than_the_host_needs():
    plan = _C.make_plan(request(0.9, 20e-6, host_s=0.2))
    assert plan.host_seconds == pytest.approx(0.2 + 20e-6 * copies(plan))
    assert plan.predicted_seconds == pytest.approx(plan.host_seconds)
    assert "The host sets the pace" in plan.reason


def test_a_host_that_is_late_in_a_step_runs_ahead_where_the_step_has_time_left():
    # Leaf a needs 8 ms to issue and 1 ms to compute, leaf b the other way round.
    leaves = [
        _C.Leaf(name="a", bytes=256, seconds=1e-3, host_seconds=8e-3, block=0),
        _C.Leaf(name="b", bytes=256, seconds=9e-3, host_seconds=0.0, block=0),
    ]
    asked = _C.PlanRequest(
        leaves=leaves,
        blocks=[_C.Block(name="blocks.0", list="blocks")],
        link=_C.Link(bytes_per_second=1e9),
        piece_bytes=1,
    )
    plan = _C.make_plan(asked)
    first = _C.simulate(plan, asked).pieces[0]
    assert plan.predicted_seconds == pytest.approx(10e-3)  # the host runs ahead, step after step
    assert first.run_end - first.run_begin == pytest.approx(1e-3)


def test_newer_times_change_what_a_plan_costs_and_not_the_plan():
    plan = _C.make_plan(request(0.5, 0.0, 0.0))
    slots = [(p.resident, p.slot_offset) for p in plan.pieces]
    before = plan.predicted_seconds
    _C.predict(plan, request(0.5, 100e-6, 0.2))
    assert plan.predicted_seconds > 0.2 > before
    assert [(p.resident, p.slot_offset) for p in plan.pieces] == slots


@pytest.mark.parametrize("share", [0.4, 0.5, 0.6])
@pytest.mark.parametrize("measured_s", [1.2 * HOST_S, 1.5 * HOST_S])
def test_a_plan_for_a_slow_host_serves_a_faster_one_nearly_as_well_as_its_own(share, measured_s):
    best = _C.make_plan(request(share, 20e-6)).predicted_seconds
    plan = _C.make_plan(request(share, 20e-6, measured_s))
    _C.predict(plan, request(share, 20e-6))
    assert plan.predicted_seconds < 1.06 * best


def test_a_negative_host_time_is_refused():
    asked = request(0.5, -1e-6)
    with pytest.raises(Exception, match="cannot be negative"):
        _C.make_plan(asked)


def test_a_device_that_catches_up_with_a_slower_host_is_not_predicted_faster_than_it():
    # While it is behind, each of its steps looks as short as the copies allow.
    asked = _C.PlanRequest(
        leaves=[
            _C.Leaf(name="a", bytes=8960, seconds=1e-5, tail_seconds=1e-5, host_seconds=3e-5),
            _C.Leaf(name="b", bytes=37120, host_seconds=6e-5),
        ],
        blocks=[_C.Block(name="blocks.0", list="blocks")],
        link=_C.Link(bytes_per_second=1e8),
        lookahead=1,
        host_seconds_per_copy=1e-5,
        offload_bytes=256,
    )
    plan = _C.make_plan(asked)
    assert plan.bound_seconds == pytest.approx(1e-4)
    assert plan.predicted_seconds == pytest.approx(1e-4)
