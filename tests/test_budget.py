"""What a cap leaves for residents and ring."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest

from blockswap.budget import MOST_FLUSHES, Budget
from blockswap.config import SwapConfig
from blockswap.device_memory import Tally
from blockswap.errors import CapError
from blockswap.learning import LEAST_SPARE_BYTES, Learned, Stage
from blockswap.room import GROW_AFTER, Reading

MIB = 2**20
LARGEST = 4 * MIB


class Counted:
    """A device whose PyTorch holds `held` bytes."""

    pool_bytes = step_bytes = held = neighbours_beside_bytes = 0

    @property
    def pool_mapped_bytes(self) -> int:
        return self.pool_bytes

    def total_bytes(self) -> int:
        return 1024 * MIB

    def tally(self) -> Tally:
        return Tally(self.held, self.held)

    def reading(self) -> Reading:
        raise AssertionError("a session under a cap alone asks nobody what others hold")


def budget(vram: str, memory: Any = None) -> Budget:
    requests: Any = SimpleNamespace(largest_bytes=LARGEST)
    return Budget(memory or Counted(), SwapConfig(vram=vram).resolve(1024 * MIB), requests)


def learned(**known: Any) -> Learned:
    return Learned(step_bytes=8 * MIB, step_reserved_bytes=10 * MIB, **known)


def plan(resident_bytes: int, streamed_bytes: int = 64 * MIB) -> Any:
    return SimpleNamespace(
        resident_bytes=resident_bytes, ring_bytes=LARGEST, streamed_bytes=streamed_bytes
    )


def test_memory_that_was_out_once_is_kept_free_from_then_on_each_time_more() -> None:
    known, capped = learned(stage=Stage.READY), budget("64MiB")
    left = [capped.grants(known, 0).cap]
    for _ in range(3):
        known.plan = plan(40 * MIB)
        known.forget_plan()
        assert known.stage is Stage.TRACE and known.plan is None
        left.append(capped.grants(known, 0).cap)
    taken = [a - b for a, b in itertools.pairwise(left) if a is not None and b is not None]
    assert len(taken) == 3
    assert all(each >= LEAST_SPARE_BYTES for each in taken)


def test_what_is_kept_free_never_makes_a_cap_impossible() -> None:
    known, tight = learned(), budget("17MiB")
    for _ in range(20):
        known.plan = plan(40 * MIB)
        known.forget_plan()
        tight.check(known, 0)
        assert tight.grants(known, 0).cap == LARGEST


def test_a_cap_below_activations_and_ring_is_refused_with_the_numbers() -> None:
    with pytest.raises(CapError, match=r"take 8.0 MiB for this input.*raise vram to 16.0 MiB"):
        budget("11.9MiB").check(learned(), 0)
    budget("12MiB").check(learned(), 0)  # it has just run so


def test_a_cap_counts_what_pytorch_caches_in_a_step_and_what_it_holds_now() -> None:
    memory = Counted()
    capped = budget("64MiB", memory)
    assert capped.grants(learned(), MIB) == (64 * MIB - 10 * MIB - MIB - 2 * MIB, None)
    memory.held = 7 * MIB
    assert capped.grants(learned(), MIB).cap == 64 * MIB - 7 * MIB - 10 * MIB - MIB - 2 * MIB


def test_a_cap_counts_what_neighbours_keep_beside_pytorch() -> None:
    memory = Counted()
    capped = budget("64MiB", memory)
    alone = capped.grants(learned(), 0).cap
    memory.neighbours_beside_bytes = 20 * MIB
    assert alone is not None and capped.grants(learned(), 0).cap == alone - 20 * MIB


def test_under_a_cap_residents_make_way_for_what_the_script_holds_and_come_back() -> None:
    memory = Counted()
    capped, known = budget("64MiB", memory), learned()
    known.plan, known.granted = plan(40 * MIB), capped.grants(known, 0)
    memory.pool_bytes = 44 * MIB
    capped.note(known.plan, known.granted)
    capped.look()
    assert not capped.is_off(known)
    memory.held = 12 * MIB
    capped.look()
    assert capped.is_off(known) and capped.is_outdated(known, 0)
    known.plan, known.granted = plan(30 * MIB), capped.grants(known, 0)
    memory.pool_bytes = 34 * MIB
    capped.note(known.plan, known.granted)
    capped.look()
    assert not capped.is_off(known) and not capped.is_outdated(known, 0)
    memory.held = 0
    capped.look()
    assert capped.is_outdated(known, 0)
    assert [capped.is_off(known) for _ in range(GROW_AFTER)] == [False] * (GROW_AFTER - 1) + [True]


def test_steps_in_which_pytorch_gave_its_cache_back_get_more_but_not_for_ever() -> None:
    capped, known = budget("64MiB"), learned()
    known.plan = plan(40 * MIB)
    left = [capped.grants(known, 0).cap]
    for _ in range(MOST_FLUSHES + 2):
        known.granted = capped.grants(known, 0)
        capped.note(known.plan, known.granted)
        capped.look()
        capped.note_flush(known)
        left.append(capped.grants(known, 0).cap)
        assert capped.is_off(known) == (left[-1] != left[-2])
        capped.note(known.plan, capped.grants(known, 0))
        assert not capped.is_off(known)
    assert left[0] is not None and left[-1] == left[0] - MOST_FLUSHES * 2 * MIB


def test_what_pytorch_caches_beyond_the_cap_goes_back_before_a_forward() -> None:
    given_back = []
    memory: Any = Counted()
    memory.held, memory.give_back = 20 * MIB, lambda: given_back.append(1)
    memory.pool_bytes = 44 * MIB
    capped = budget("64MiB", memory)
    capped.look()
    assert not given_back
    memory.pool_bytes += 1
    capped.look()
    assert given_back


def test_pytorchs_cache_goes_back_only_where_a_plan_would_pass_the_cap() -> None:
    given_back = []
    memory: Any = Counted()
    memory.held, memory.give_back = 20 * MIB, lambda: given_back.append(1)
    capped = budget("64MiB", memory)
    capped.clear_for(42 * MIB)  # and the margin of 2
    assert not given_back
    capped.clear_for(42 * MIB + 1)
    assert given_back
