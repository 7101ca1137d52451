"""How much of a device residents and ring take while others use it, too."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockswap.room import GROW_AFTER, LEAST_MARGIN_BYTES, Reading, Room, Verdict, margin_bytes

GIB = 2**30
MIB = 2**20


class Card:
    """A device with a session whose pool takes what it may in units, a program beside it."""

    def __init__(
        self, total: int, wanted: int, step_bytes: int = 0, reserve: int = 0, unit: int = 1
    ) -> None:
        self.total, self.wanted, self.step_bytes, self.unit = total, wanted, step_bytes, unit
        self.room = Room(margin_bytes(total), reserve)
        self.others = self.pool = self.left = self.changes = 0
        self.plan()

    def plan(self) -> None:
        budget = self.room.budget(self.reading(), self.step_bytes)
        self.pool = min(self.wanted, max(self.unit, budget // self.unit * self.unit))
        self.left = budget - self.pool
        self.room.look_again()
        self.changes += 1

    def reading(self) -> Reading:
        return Reading(unused=self.total - self.others - self.pool, pool=self.pool)

    @property
    def free(self) -> int:
        return self.reading().unused

    def step(self) -> None:
        wants_more = self.pool < self.wanted
        verdict = self.room.judge(self.reading(), self.step_bytes, self.left, wants_more)
        if verdict is not Verdict.STAY:
            self.plan()

    def ask(self, num_bytes: int) -> bool:
        """Let the other program ask for memory; whether it gets it."""
        if num_bytes > self.free:
            return False
        self.others += num_bytes
        return True


@pytest.mark.parametrize("gib", [6, 8, 12, 16, 24, 48, 80, 141])
def test_the_margin_holds_a_request_of_512_mib_on_every_card(gib: int) -> None:
    margin = margin_bytes(gib * GIB)
    assert margin >= 512 * MIB
    assert margin <= gib * GIB // 10
    assert gib < 8 or margin >= LEAST_MARGIN_BYTES


def test_what_nobody_needs_is_used_but_for_margin_step_and_reserve() -> None:
    card = Card(24 * GIB, wanted=100 * GIB, step_bytes=2 * GIB, reserve=3 * GIB)
    left = card.free
    assert left >= margin_bytes(24 * GIB) + 2 * GIB + 3 * GIB
    assert left <= margin_bytes(24 * GIB) + 2 * GIB + 3 * GIB + GIB // 4


def test_a_program_that_asks_for_less_than_the_margin_gets_it_and_the_next_one_a_step_later() -> (
    None
):
    card = Card(24 * GIB, wanted=100 * GIB)
    for _ in range(16):  # 8 GiB
        assert card.ask(512 * MIB)
        card.step()
        assert card.free >= 512 * MIB


def test_room_that_stays_is_taken_within_a_few_steps() -> None:
    card = Card(24 * GIB, wanted=100 * GIB)
    before = card.pool
    for _ in range(16):
        card.ask(512 * MIB)
        card.step()
    assert card.pool < before - 7 * GIB
    card.others = 0
    for _ in range(GROW_AFTER):
        card.step()
    assert card.pool == before


def test_room_that_comes_and_goes_is_not_taken() -> None:
    card = Card(24 * GIB, wanted=100 * GIB)
    card.others = 4 * GIB
    card.step()
    small, changes = card.pool, card.changes
    for _ in range(10):
        card.others = 0
        card.step()
        card.others = 4 * GIB
        card.step()
    assert (card.pool, card.changes) == (small, changes)


def test_a_pool_that_holds_all_it_wants_does_not_grow() -> None:
    card = Card(24 * GIB, wanted=4 * GIB)
    for _ in range(5):
        card.step()
    assert (card.pool, card.changes) == (4 * GIB, 1)


@given(
    total=st.integers(8, 160).map(lambda gib: gib * GIB),
    unit=st.sampled_from([1, 64 * MIB, 600 * MIB, 3 * GIB]),
    moves=st.lists(st.integers(-4096, 4096).map(lambda mib: mib * MIB), max_size=40),
)
def test_nothing_moves_while_nothing_changes_and_nobody_is_overdrawn(
    total: int, unit: int, moves: list[int]
) -> None:
    card = Card(total, wanted=2 * total, unit=unit)
    for move in moves:
        card.others = max(0, card.others + min(move, card.free))
        for _ in range(GROW_AFTER + 1):
            card.step()
        settled = card.changes
        for _ in range(5):
            card.step()
        assert card.changes == settled
        # What stays free is about the margin, unless the pool cannot be smaller; where that is
        # 768 MiB, a request of 512 MiB succeeds.
        margin, smallest = margin_bytes(total), card.pool <= unit
        assert card.free >= margin * 11 // 16 or smallest
        assert card.free >= 512 * MIB or smallest
        assert card.free <= margin + margin // 2 + margin // 16 + 2 * unit


def test_memory_that_leaves_the_cache_counts_as_taken() -> None:
    card = Card(24 * GIB, wanted=100 * GIB)
    card.step()
    now = Reading(card.free - GIB, card.pool)
    assert card.room.judge(now, 0, card.left, wants_more=True) is Verdict.SHED


def test_room_that_had_to_be_given_up_again_is_taken_later_each_time() -> None:
    card = Card(24 * GIB, wanted=100 * GIB)
    card.room = Room(margin_bytes(card.total), learns=True)
    waits = []
    for _ in range(5):
        card.others = 4 * GIB
        card.step()
        shed = card.changes
        card.others = 0
        waited = 0
        while card.changes == shed:
            card.step()
            waited += 1
        waits.append(waited)
    assert waits == [GROW_AFTER * 2**i for i in range(5)]
