"""Turns: which of them count is decided by the unhooked twin alone."""

from __future__ import annotations

from benchmarks.turns import ENOUGH_TURNS, Turn, quietest


def turn(twin_ms: float, model_ms: float = 70.0) -> Turn:
    return Turn(twin=[twin_ms] * 4, busy_twin=[twin_ms] * 4, model=[model_ms] * 4)


def test_turns_with_a_slow_twin_before_or_after_do_not_count():
    quiet = [turn(60.0 + i / 10) for i in range(ENOUGH_TURNS + 1)]
    slow = turn(80.0)
    turns = [*quiet[:6], slow, *quiet[6:]]

    counted, is_quiet = quietest(turns, [60.0])

    assert slow not in counted
    assert turns[5] not in counted  # the twin was slow right after it
    assert len(counted) == ENOUGH_TURNS
    assert is_quiet


def test_what_the_model_took_plays_no_part():
    turns = [turn(60.0 + i, model_ms=200.0 - i) for i in range(2 * ENOUGH_TURNS)]
    swapped = [turn(60.0 + i, model_ms=50.0 + i) for i in range(2 * ENOUGH_TURNS)]

    chosen = [t.twin for t in quietest(turns, [60.0])[0]]

    assert chosen == [t.twin for t in quietest(swapped, [60.0])[0]]
    assert chosen == [t.twin for t in turns[:ENOUGH_TURNS]]


def test_an_unsteady_twin_is_told():
    turns = [turn(60.0 + 2 * i) for i in range(ENOUGH_TURNS)]

    counted, is_quiet = quietest(turns, [60.0])

    assert len(counted) == ENOUGH_TURNS
    assert not is_quiet
