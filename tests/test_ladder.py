"""What is given up when memory is out, and which forwards can run again."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from blockswap.attempt import Attempt
from blockswap.ladder import Held, Rung, next_rung, tell

CPU = torch.device("cpu")
MIB = 2**20


def test_residents_go_first_then_the_ring_then_what_lies_outside_the_blocks() -> None:
    assert next_rung(Held(MIB, 8 * MIB, MIB, MIB)) is Rung.SHED
    assert next_rung(Held(0, 8 * MIB, MIB, MIB)) is Rung.RING
    assert next_rung(Held(0, MIB, MIB, MIB)) is Rung.LAYERWISE
    assert next_rung(Held(0, 0, MIB, MIB)) is Rung.LAYERWISE
    assert next_rung(Held(0, MIB, MIB, 0)) is None


def test_every_rung_says_what_it_gives_back_and_the_last_word_what_else_helps() -> None:
    held = Held(residents=5 * MIB, ring=3 * MIB, smallest_ring=MIB, outside=7 * MIB)
    assert "residents (5.0 MiB)" in tell(Rung.SHED, held, repeats=True)
    assert "ring of 3.0 MiB for the smallest, of 1.0 MiB" in tell(Rung.RING, held, repeats=True)
    assert "outside the blocks (up to 7.0 MiB)" in tell(Rung.LAYERWISE, held, repeats=True)
    assert "the forward runs again" in tell(Rung.SHED, held, repeats=True)
    assert "call again" in tell(Rung.SHED, held, repeats=False)
    assert "3.0 MiB for its smallest ring" in tell(None, held, repeats=False)


class Model(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.rand(())


def attempt(*inputs: object, model: nn.Module | None = None) -> Attempt:
    return Attempt(model or Model().eval(), (inputs, {}), CPU)


def test_a_forward_draws_the_same_random_numbers_again() -> None:
    model, x = Model(), torch.zeros(3)
    first = attempt(x, model=model)
    drawn = model(x)
    assert first.rewind()
    assert torch.equal(model(x), drawn)


def test_plain_inputs_do_not_stand_in_the_way() -> None:
    inputs = (None, 1, 2.0, "a", True, torch.float32, [torch.zeros(1)], {"a": {"b": torch.ones(1)}})
    assert attempt(*inputs).rewind()


@torch.no_grad()
@pytest.mark.parametrize("nested", [False, True])
def test_a_forward_that_wrote_to_an_input_is_not_repeated(nested: bool) -> None:
    x = torch.zeros(3)
    tried = attempt({"deep": [x]} if nested else x)
    x.add_(1)
    assert not tried.rewind()


def test_inputs_whose_writes_nobody_counts_are_not_trusted() -> None:
    with torch.inference_mode():
        x = torch.zeros(3)
    assert not attempt(x).rewind()


def test_an_input_that_may_keep_state_is_not_trusted() -> None:
    cache: Any = SimpleNamespace(keys=[])
    assert not attempt(torch.zeros(1), cache).rewind()
    assert not attempt({"cache": cache}).rewind()


def test_a_model_whose_next_call_reads_what_the_last_one_left_is_not_repeated() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    assert attempt(model=model.eval()).rewind()
    assert not attempt(model=model.train()).rewind()
    model.eval()
    model[0]._diffusers_hook = SimpleNamespace(hooks={"cache": SimpleNamespace(_is_stateful=True)})
    assert not attempt(model=model).rewind()
    model[0]._diffusers_hook.hooks["cache"]._is_stateful = False
    assert attempt(model=model).rewind()


def test_a_class_whose_forward_a_tool_exchanged_is_not_repeated() -> None:
    class Patched(nn.Linear):
        pass

    assert attempt(model=Patched(4, 4)).rewind()
    Patched.forward = lambda self, x: x  # type: ignore[method-assign,assignment]
    Patched.__module__ = "elsewhere"
    assert not attempt(model=Patched(4, 4)).rewind()
