"""What the ring holds over a step: worked out from one step, compared with all steps."""

import dataclasses

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from ring_steps import Piece, any_steps, run_steps

from blockswap.report import PieceSpan, Timeline
from blockswap.ring_use import RingUse, mean_held_bytes, ring_use


def own_bytes(timeline, ms):
    """What the step's own pieces hold: measured, nothing assumed."""
    return sum(s.bytes for s in timeline.spans if s.copy_begin_ms <= ms < s.run_end_ms)


def span(piece, copy, run, num_bytes=10):
    wait = (min(run[0], copy[0]), run[0])
    return PieceSpan(piece, f"blocks.{piece}", "blocks", num_bytes, *copy, *wait, run[1])


@given(any_steps())
def test_one_step_of_a_steady_cycle_tells_what_the_ring_holds_at_every_moment(steps):
    *_, one, following = steps.timelines
    assume(one == following)
    for use in ring_use(one):
        now_ms = steps.begins_ms[-2] + use.begin_ms
        if use.begin_ms < one.step_ms:  # the last step has no next one that would be fetched
            assert use.held_bytes == steps.held_bytes(now_ms), use


@given(any_steps())
def test_a_steady_cycle_ends_a_step_as_it_began_it(steps):
    *_, one, following = steps.timelines
    assume(one == following)
    uses = ring_use(one)
    at_begin = next(use for use in uses if use.begin_ms == 0)
    assert uses[-1]._replace(begin_ms=0) == at_begin


@given(any_steps(max_pause_ms=30, max_links=3))
def test_no_state_is_ever_negative_and_the_ring_never_overfull(steps):
    for timeline in steps.timelines:
        for use in ring_use(timeline, steps.ring_bytes):
            assert min(use.filling_bytes, use.ready_bytes, use.in_use_bytes) >= 0
            assert use.held_bytes <= steps.ring_bytes


@given(any_steps(max_pause_ms=30, max_links=3))
def test_no_more_is_assumed_of_other_steps_than_the_step_itself_leaves_room_for(steps):
    timeline = steps.timelines[-1]
    for use in ring_use(timeline, steps.ring_bytes):
        assert own_bytes(timeline, use.begin_ms) <= use.held_bytes <= steps.ring_bytes


@given(any_steps(max_pause_ms=30, max_links=3))
def test_entries_follow_each_other_from_the_first_copy_to_the_end_of_the_step(steps):
    for timeline in steps.timelines:
        times = [use.begin_ms for use in ring_use(timeline)]
        assert times == sorted(set(times))
        assert times[0] == min(0, *(s.copy_begin_ms for s in timeline.spans), 0)
        assert 0 in times and times[-1] == timeline.step_ms


def test_a_slot_fills_is_ready_is_in_use_and_is_free_again():
    timeline = Timeline(10.0, (span(0, copy=(1.0, 3.0), run=(4.0, 7.0)),))
    assert ring_use(timeline) == [
        RingUse(0.0, 0, 0, 0),
        RingUse(1.0, 10, 0, 0),
        RingUse(3.0, 0, 10, 0),
        RingUse(4.0, 0, 0, 10),
        RingUse(7.0, 0, 0, 0),
        RingUse(10.0, 0, 0, 0),
    ]


def test_what_was_fetched_in_the_step_before_is_fetched_for_the_next_one_too():
    timeline = Timeline(10.0, (span(0, copy=(-3.0, -1.0), run=(0.0, 5.0)),))
    assert ring_use(timeline) == [
        RingUse(-3.0, 10, 0, 0),
        RingUse(-1.0, 0, 10, 0),
        RingUse(0.0, 0, 0, 10),
        RingUse(5.0, 0, 0, 0),
        RingUse(7.0, 10, 0, 0),
        RingUse(9.0, 0, 10, 0),
        RingUse(10.0, 0, 0, 10),
    ]


def test_resident_pieces_take_no_bytes_of_the_ring():
    resident = PieceSpan(0, "blocks.0", "blocks", 10, 0.0, 0.0, 0.0, 0.0, 9.0)
    assert [use.held_bytes for use in ring_use(Timeline(9.0, (resident,)))] == [0, 0]


@given(any_steps(max_pause_ms=5000))
def test_no_piece_is_in_the_ring_twice_however_long_the_pause_between_steps(steps):
    timeline = steps.timelines[-1]
    for span in timeline.spans:
        alone = dataclasses.replace(timeline, spans=(span,))
        assert max(use.held_bytes for use in ring_use(alone)) <= span.bytes


def test_after_a_long_pause_the_next_copies_follow_the_last_one():
    steps = run_steps([Piece(60, 2, 2)] * 4, ring_bytes=120, pause_ms=5000)
    timeline = steps.timelines[-1]
    assert timeline.spans[0].copy_begin_ms < -5000
    last_ms = max(span.copy_end_ms for span in timeline.spans)
    before = [use for use in ring_use(timeline) if 0 <= use.begin_ms < last_ms]
    assert [use.held_bytes for use in before] == [own_bytes(timeline, u.begin_ms) for u in before]


def test_a_run_that_is_stamped_before_the_end_of_its_copy_makes_nothing_negative():
    timeline = Timeline(10.0, (span(0, copy=(1.0, 4.002), run=(4.0, 7.0)),))
    assert RingUse(4.0, 0, 0, 10) in ring_use(timeline)
    assert all(min(use[1:]) >= 0 for use in ring_use(timeline))


def test_a_fetch_that_is_stamped_before_the_release_it_waited_for_fits_into_the_ring():
    spans = (span(0, (0.0, 1.0), (1.0, 5.0)), span(1, (4.998, 6.0), (6.0, 8.0)))
    uses = ring_use(Timeline(10.0, spans), ring_bytes=10)
    assert RingUse(4.998, 0, 0, 10) in uses
    assert RingUse(5.0, 10, 0, 0) in uses


def test_the_mean_counts_the_step_and_not_what_was_fetched_before_it():
    timeline = Timeline(10.0, (span(0, copy=(-3.0, -1.0), run=(0.0, 5.0)),))
    assert mean_held_bytes(ring_use(timeline)) == pytest.approx(8.0)  # free from 5 to 7
    assert mean_held_bytes([]) == 0.0


@given(any_steps(max_pause_ms=30), st.integers(2, 50))
def test_bytes_scale_with_the_pieces(steps, factor):
    timeline = steps.timelines[-1]
    larger = [dataclasses.replace(s, bytes=factor * s.bytes) for s in timeline.spans]
    expected = [factor * use.held_bytes for use in ring_use(timeline)]
    got = ring_use(dataclasses.replace(timeline, spans=tuple(larger)))
    assert [use.held_bytes for use in got] == expected
