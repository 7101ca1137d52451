"""Turns: each one's fastest quarter counts, and no one always goes first."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.quiet import quiet_ms, quiet_spells
from benchmarks.turns import ENOUGH_TURNS, MOST_TURNS, STEPS_OF_SPELL, Turns, Twin
from blockswap.bench.core import Core
from blockswap.cores import num_cores


def test_the_fastest_quarter_of_spells_counts_by_their_medians() -> None:
    spells = [[60.0 + i, 60.0 + i, 500.0] for i in (5, 1, 7, 0, 3, 6, 2, 4)]
    assert quiet_spells(spells) == [[60.0, 60.0, 500.0], [61.0, 61.0, 500.0]]


def test_of_few_spells_the_fastest_counts() -> None:
    assert quiet_spells([[70.0], [60.0], [80.0]]) == [[60.0]]


def test_the_quiet_time_is_that_of_the_fastest_quarter() -> None:
    assert quiet_ms([90.0, 61.0, 60.0, 62.0, 500.0, 70.0, 64.0, 66.0]) == 60.5
    assert quiet_ms([70.0, 60.0]) == 60.0


@pytest.mark.parametrize(("third_ms", "enough"), [(61.0, True), (62.0, False)])
def test_turns_are_enough_once_the_twins_fastest_quarter_is_alike(
    third_ms: float, enough: bool
) -> None:
    slow = [[90.0]] * (ENOUGH_TURNS - 3)
    assert Turns(twin=[[60.0], *slow, [60.5], [third_ms]]).are_enough is enough
    assert not Turns(twin=[[60.0]] * (ENOUGH_TURNS - 1)).are_enough


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system binds no threads")
def test_a_thread_is_bound_to_one_core_and_freed() -> None:
    core, cores = Core(), os.sched_getaffinity(0)
    try:
        core.choose()
        assert len(os.sched_getaffinity(0)) == num_cores() == 1
    finally:
        core.free()
    assert os.sched_getaffinity(0) == cores


class Said(nn.Module):
    """Says that it ran."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[str] = []
        self.name = "twin"

    def __deepcopy__(self, memo: Any) -> Said:
        copy = Said()
        copy.log = self.log
        return copy

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        self.log.append(self.name)
        return (x + len(self.name),)


def test_who_begins_a_turn_changes_and_the_output_is_the_models(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Turns, "are_enough", False)
    model = Said()
    twin = Twin(model, {"x": torch.zeros(1)})
    model.name = "model"

    turns, output = twin.take_turns(model, 64)

    assert len(turns.twin) == len(turns.busy_twin) == len(turns.model) == MOST_TURNS
    assert output.item() == len("model")
    steps = STEPS_OF_SPELL
    first = [model.log[i * steps : (i + 1) * steps] for i in range(9)]
    # Idle, busy, model; busy, model, idle; model, idle, busy.
    is_model = [spell == ["model"] * steps for spell in first]
    assert is_model == [False, False, True, False, True, False, True, False, False]
    assert all(len(set(spell)) == 1 for spell in first)
