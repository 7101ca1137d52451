"""The neighbour of the benchmark: what it takes, how long it waits, and when a step is fast again."""

from __future__ import annotations

import pytest

from benchmarks.neighbour import (
    MOST_BYTES,
    MOST_WAIT_S,
    REQUEST_BYTES,
    Played,
    as_fast_after,
    play,
    smaller_inputs,
)
from blockswap.bench import zoo


class Memory:
    """So many blocks, of which each comes back only after a while."""

    def __init__(self, blocks: int, refuses_until: float = 0.0) -> None:
        self.now = 0.0
        self.blocks = blocks
        self.refuses_until = refuses_until
        self.held: list[object] = []
        self.given_back = 0

    def take(self) -> object | None:
        is_full = len(self.alive()) >= self.blocks
        return None if is_full or self.now < self.refuses_until else self.keep(Block(self))

    def keep(self, block: object) -> object:
        return block

    def alive(self) -> list[object]:
        return self.held

    def give_back(self) -> None:
        self.given_back += 1

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Block:
    """Is held until nobody names it."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        memory.held.append(id(self))

    def __del__(self) -> None:
        self._memory.held.remove(id(self))


def run(memory: Memory, seconds: float = 60.0) -> Played:
    return play(seconds, memory.take, memory.give_back, lambda: memory.now, memory.sleep, seed=1)


def test_it_takes_up_to_its_bound_and_returns_all() -> None:
    memory = Memory(blocks=100)
    played = run(memory)
    assert MOST_BYTES // 2 <= played.most_bytes <= MOST_BYTES
    assert played.requests > 50 and played.retried == played.refused == 0
    assert played.longest_wait_s == 0.0
    assert memory.held == [] and memory.given_back > 20


def test_a_request_is_retried_until_there_is_memory_and_its_wait_is_noted() -> None:
    played = run(Memory(blocks=100, refuses_until=1.5))
    assert (played.retried, played.refused) == (1, 0)
    assert played.longest_wait_s == pytest.approx(1.5, abs=0.1)


def test_a_request_that_is_never_granted_is_counted() -> None:
    played = run(Memory(blocks=0))
    assert played.refused == played.requests >= 5
    assert played.longest_wait_s == pytest.approx(MOST_WAIT_S, abs=0.1)
    assert played.most_bytes == 0 < REQUEST_BYTES


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([100.0, 101.0], 0),
        ([150.0, 100.0, 101.0], 1),
        ([100.0, 100.0, 130.0, 100.0], 3),
        ([100.0, 100.0, 104.0, 101.0, 100.0], 0),
        ([150.0, 103.0, 104.0, 100.0], None),
        ([130.0, 100.0, 130.0], None),
        ([], None),
    ],
)
def test_steps_are_fast_again_when_no_long_one_follows_and_most_are_as_before(
    steps: list[float], expected: int | None
) -> None:
    assert as_fast_after(steps, 100.0) == expected


def test_the_smaller_resolution_runs() -> None:
    model = zoo.build("flux", "tiny")
    inputs = zoo.make_inputs("flux", model)
    small = smaller_inputs(inputs)
    assert model(**small)[0].shape[1] * 16 == model(**inputs)[0].shape[1] * 9
