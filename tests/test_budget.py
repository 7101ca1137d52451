"""What a cap leaves for residents and ring."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest

from blockswap.budget import Budget
from blockswap.config import SwapConfig
from blockswap.errors import CapError
from blockswap.learning import LEAST_SPARE_BYTES, Learned, Stage

MIB = 2**20
LARGEST = 4 * MIB


def budget(vram: str) -> Budget:
    memory: Any = SimpleNamespace(allocated_bytes=lambda: 0, total_bytes=lambda: 1024 * MIB)
    requests: Any = SimpleNamespace(largest_bytes=LARGEST)
    return Budget(memory, SwapConfig(vram=vram).resolve(1024 * MIB), requests)


def test_memory_that_was_out_once_is_kept_free_from_then_on_each_time_more() -> None:
    learned = Learned(torch_peak_bytes=10 * MIB, step_bytes=8 * MIB, stage=Stage.READY)
    capped = budget("64MiB")
    left = [capped.by_cap(learned, 0)]
    for _ in range(3):
        learned.forget_plan()
        assert learned.stage is Stage.TRACE and learned.plan is None
        left.append(capped.by_cap(learned, 0))
    taken = [a - b for a, b in itertools.pairwise(left) if a is not None and b is not None]
    assert len(taken) == 3
    assert all(each >= LEAST_SPARE_BYTES for each in taken)


def test_what_is_kept_free_never_makes_a_cap_impossible() -> None:
    learned = Learned(torch_peak_bytes=10 * MIB, step_bytes=8 * MIB)
    tight = budget("17MiB")
    for _ in range(20):
        learned.forget_plan()
        assert tight.by_cap(learned, 0) == LARGEST


def test_a_cap_below_activations_and_ring_is_refused_with_the_numbers() -> None:
    learned = Learned(torch_peak_bytes=10 * MIB)
    with pytest.raises(CapError, match=r"take 10.0 MiB for this input.*raise vram to 16.0 MiB"):
        budget("15MiB").by_cap(learned, 0)


def test_a_session_under_a_cap_alone_does_not_look_at_others() -> None:
    capped = budget("64MiB")
    assert not capped.follows
    assert not capped.is_off(Learned())  # and asks the device nothing: it has no such method
    assert not capped.is_outdated(Learned(), 0)
