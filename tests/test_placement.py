"""Residents that would lie between holes move together, within the pages that they have."""

from __future__ import annotations

from collections.abc import Collection
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from blockswap import _C, placement
from blockswap.placement import Placement

PAGE = 2**21
LEAF = PAGE + 4096  # never a whole number of pages
NUM_LEAVES = 12


class SmallPool:
    """A session's pool over pages of host memory; notes what was mapped at each allocation."""

    def __init__(self) -> None:
        self._pool = _C.CachingPool(_C.make_device("cpu", 0), _C.make_host_pages(2**28, PAGE))
        self._sizes: dict[int, int] = {}
        self.mapped: list[int] = []

    def allocate(self, num_bytes: int, _: torch.Tensor) -> int:
        self.mapped.append(self._pool.stats().reserved_bytes)
        address = int(self._pool.allocate(num_bytes))
        self._sizes[address] = num_bytes
        return address

    def free(self, address: int) -> None:
        self._pool.free(address)
        del self._sizes[address]

    @property
    def bytes(self) -> int:
        return sum(self._sizes.values())

    def give_back(self) -> int:
        return int(self._pool.trim())

    page_bytes = PAGE

    @property
    def unused_bytes(self) -> int:
        stats = self._pool.stats()
        return int(stats.reserved_bytes - stats.allocated_bytes)


def change(made: Placement, residents: Collection[int], ring_bytes: int = 0) -> list[int]:
    return made.change(residents, ring_bytes, stream=lambda: None)


def placed(pool: SmallPool, free: int | None = None) -> Placement:
    flushes: list[str] = []
    memory: Any = SimpleNamespace(
        begin_span=lambda: None,
        counts_pool=False,
        free_bytes=lambda: free,
        give_back=lambda: flushes.append("flush"),
        flushes=flushes,
    )
    host: Any = SimpleNamespace(image_bytes=[LEAF] * NUM_LEAVES, image=lambda leaf: leaf)
    engine: Any = SimpleNamespace(copy_fixed=lambda *_: None, stop=lambda: None)
    made = Placement(pool, memory, engine, host, torch.empty(0))  # type: ignore[arg-type]
    change(made, range(NUM_LEAVES))
    pool.mapped.clear()
    return made


EVERY_OTHER = range(0, NUM_LEAVES, 2)


@pytest.fixture
def one_page_is_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "MOST_UNUSED_BYTES", PAGE)


def test_residents_stay_where_they_are_if_little_lies_between_them() -> None:
    pool = SmallPool()
    made = placed(pool)
    before = [made.address(leaf) for leaf in EVERY_OTHER]
    assert change(made, EVERY_OTHER) == []
    assert [made.address(leaf) for leaf in EVERY_OTHER] == before


@pytest.mark.usefixtures("one_page_is_too_much")
def test_residents_with_too_much_between_them_move_into_pages_that_were_mapped_before() -> None:
    pool = SmallPool()
    made = placed(pool)
    assert change(made, EVERY_OTHER, PAGE) == list(EVERY_OTHER)  # they need their images again
    assert min(pool.mapped) >= len(EVERY_OTHER) * LEAF
    addresses = [made.address(leaf) for leaf in EVERY_OTHER]
    assert max(addresses) - min(addresses) < len(addresses) * (LEAF + PAGE)
    assert pool.unused_bytes < 2 * PAGE


@pytest.mark.usefixtures("one_page_is_too_much")
def test_pages_that_are_mapped_already_are_not_asked_of_others() -> None:
    made = placed(SmallPool(), free=0)
    made._memory.flushes.clear()  # type: ignore[attr-defined]
    change(made, EVERY_OTHER)
    assert made._memory.flushes == []  # type: ignore[attr-defined]
    change(made, range(NUM_LEAVES))  # these need more
    assert made._memory.flushes == ["flush"]  # type: ignore[attr-defined]


@pytest.mark.usefixtures("one_page_is_too_much")
def test_a_move_that_finds_no_memory_keeps_no_page_and_no_resident(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pool = SmallPool()
    made = placed(pool)
    allocate, calls = pool.allocate, []

    def failing(num_bytes: int, token: torch.Tensor) -> int:
        calls.append(num_bytes)
        if len(calls) == 3:
            raise MemoryError
        return allocate(num_bytes, token)

    monkeypatch.setattr(pool, "allocate", failing)
    with pytest.raises(MemoryError):
        change(made, EVERY_OTHER)
    assert not any(leaf in made for leaf in range(NUM_LEAVES))
    assert pool.unused_bytes == 0
    assert change(made, EVERY_OTHER) == list(EVERY_OTHER)


def test_where_memory_comes_in_no_pages_residents_move_if_too_much_stays_unused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pool = SmallPool()
    pool.page_bytes = 0
    made = placed(pool)
    assert change(made, EVERY_OTHER) == []
    monkeypatch.setattr(placement, "MOST_UNUSED_BYTES", PAGE)
    assert change(made, range(0, NUM_LEAVES, 4)) == list(range(0, NUM_LEAVES, 4))


def test_room_is_made_from_the_highest_addresses_and_filled_again_with_what_left() -> None:
    pool = SmallPool()
    made = placed(pool)
    ranked = sorted(range(NUM_LEAVES), key=made.address)
    change(made, range(NUM_LEAVES), PAGE)
    made.leave_room(PAGE)
    assert made.ring == 0 and all(leaf in made for leaf in ranked), "the ring was enough"
    made.leave_room(2 * LEAF + 1)
    assert [leaf for leaf in ranked if leaf in made] == ranked[:-3]
    assert pool.unused_bytes < 2 * PAGE
    assert sorted(change(made, range(NUM_LEAVES), PAGE)) == sorted(ranked[-3:])
    made.leave_room(2**40)
    assert pool.bytes == pool.unused_bytes == 0


def test_each_resident_is_sent_for_before_memory_is_mapped_for_the_next_and_streaming_before_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pool = SmallPool()
    made = placed(pool)
    made.clear()
    done: list[str] = []
    allocate, copy = pool.allocate, made.copy

    def noted(num_bytes: int, token: torch.Tensor) -> int:
        done.append("ring" if num_bytes == PAGE else "memory")
        return allocate(num_bytes, token)

    monkeypatch.setattr(pool, "allocate", noted)
    monkeypatch.setattr(made, "copy", lambda leaf: (done.append("copy"), copy(leaf)))
    made.change([4, 2], PAGE, stream=lambda: done.append("stream"))
    assert done == ["ring", "stream", "memory", "copy", "memory", "copy"]


def test_where_memory_runs_out_the_engine_stops_before_what_it_copies_into_is_freed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pool = SmallPool()
    made = placed(pool)
    made.leave_room(4 * LEAF)
    staying = [leaf for leaf in range(NUM_LEAVES) if leaf in made]
    allocate, free, done = pool.allocate, pool.free, []

    def failing(num_bytes: int, token: torch.Tensor) -> int:
        done.append("memory")
        if len(done) == 4:
            raise MemoryError
        return allocate(num_bytes, token)

    monkeypatch.setattr(pool, "allocate", failing)
    monkeypatch.setattr(pool, "free", lambda address: (done.append("free"), free(address)))
    monkeypatch.setattr(made._engine, "stop", lambda: done.append("stop"), raising=False)
    with pytest.raises(MemoryError):
        change(made, range(NUM_LEAVES), PAGE)
    assert done == ["memory"] * 4 + ["stop"] + ["free"] * 3
    assert [leaf for leaf in range(NUM_LEAVES) if leaf in made] == staying
    assert pool.bytes == len(staying) * LEAF
