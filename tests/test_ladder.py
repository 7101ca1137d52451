"""What is given up when memory is out, and which forwards can run again."""

from __future__ import annotations

import functools
import types
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import blockswap
from blockswap.attempt import OURS, Attempt, Stillness
from blockswap.ladder import Holding, Rung, next_rung, tell

CPU = torch.device("cpu")
MIB = 2**20


def test_residents_go_first_then_the_ring_then_what_lies_outside_the_blocks() -> None:
    assert next_rung(Holding(MIB, 8 * MIB, MIB, MIB, neighbours=MIB)) is Rung.NEIGHBOURS
    assert next_rung(Holding(MIB, 8 * MIB, MIB, MIB)) is Rung.SHED
    assert next_rung(Holding(0, 8 * MIB, MIB, MIB)) is Rung.RING
    assert next_rung(Holding(0, MIB, MIB, MIB)) is Rung.LAYERWISE
    assert next_rung(Holding(0, 0, MIB, MIB)) is Rung.LAYERWISE
    assert next_rung(Holding(0, MIB, MIB, 0)) is None


def test_every_rung_says_what_it_gives_back_and_the_last_word_what_else_helps() -> None:
    held = Holding(residents=5 * MIB, ring=3 * MIB, smallest_ring=MIB, outside=7 * MIB)
    assert "residents (5.0 MiB)" in tell(Rung.SHED, held, repeats=True)
    assert "ring of 3.0 MiB for the smallest, of 1.0 MiB" in tell(Rung.RING, held, repeats=True)
    assert "outside the blocks (up to 7.0 MiB)" in tell(Rung.LAYERWISE, held, repeats=True)
    assert "the forward runs again" in tell(Rung.SHED, held, repeats=True)
    assert "call again" in tell(Rung.SHED, held, repeats=False)
    assert "3.0 MiB for its smallest ring" in tell(None, held, repeats=False)


class Model(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.rand(())


def attempt(*inputs: object) -> Attempt:
    return Attempt((inputs, {}), CPU)


def test_a_forward_draws_the_same_random_numbers_again() -> None:
    model, x = Model(), torch.zeros(3)
    first = attempt(x)
    drawn = model(x)
    assert first.rewind()
    assert torch.equal(model(x), drawn)


def test_plain_inputs_do_not_stand_in_the_way() -> None:
    inputs = (None, 1, 2.0, "a", True, torch.float32, [torch.zeros(1)], {"a": {"b": torch.ones(1)}})
    assert attempt(*inputs).rewind()


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [
        lambda x, xs, kw: x.add_(1),
        lambda x, xs, kw: xs[0].add_(1),
        lambda x, xs, kw: xs.__setitem__(0, xs[0] * 2),
        lambda x, xs, kw: xs.append(x),
        lambda x, xs, kw: kw.pop("scale"),
        lambda x, xs, kw: kw.__setitem__("scale", 3.0),
        lambda x, xs, kw: kw["deep"].__setitem__("y", x),
    ],
)
def test_a_forward_that_changed_its_inputs_is_not_repeated(change: Any) -> None:
    x, xs = torch.zeros(3), [torch.zeros(3)]
    kw: dict[str, Any] = {"scale": 2.0, "deep": {"y": torch.zeros(1)}}
    tried = attempt(x, xs, kw)
    change(x, xs, kw)
    assert not tried.rewind()


def test_inputs_whose_writes_nobody_counts_are_not_trusted() -> None:
    with torch.inference_mode():
        x = torch.zeros(3)
    assert not attempt(x).rewind()


def test_an_input_that_may_keep_state_is_not_trusted() -> None:
    cache: Any = SimpleNamespace(keys=[])
    assert not attempt(torch.zeros(1), cache).rewind()
    assert not attempt({"cache": cache}).rewind()


class Counting(nn.Linear):
    """Keeps something of each kind from call to call."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.calls = 0
        self.seen: list[int] = []
        self.by_name: dict[str, torch.Tensor] = {}
        self.register_buffer("total", torch.zeros(1))


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m, "calls", m.calls + 1),
        lambda m: m.seen.append(1),
        lambda m: m.by_name.__setitem__("a", torch.zeros(1)),
        lambda m: m.total.add_(1),
        lambda m: m.register_buffer("total", torch.ones(1)),
        lambda m: setattr(m, "fresh", 1),
    ],
)
def test_a_model_that_keeps_something_from_call_to_call_is_not_repeated(change: Any) -> None:
    model = nn.Sequential(Counting())
    still = Stillness(model)
    assert still.holds()
    change(model[0])
    assert not still.holds()


def test_a_generator_of_the_models_own_is_not_trusted() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].generator = torch.Generator()
    assert not Stillness(model).holds()


def test_batch_statistics_and_cache_hooks_are_not_trusted() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    assert Stillness(model.eval()).holds()
    assert not Stillness(model.train()).holds()
    model.eval()
    hook = SimpleNamespace(_is_stateful=True)
    model[0]._diffusers_hook = SimpleNamespace(hooks={"cache": hook})
    assert not Stillness(model).holds()
    hook._is_stateful = False
    assert Stillness(model).holds()


def test_a_forward_that_a_tool_exchanged_is_not_trusted() -> None:
    class Patched(nn.Linear):
        pass

    model = nn.Sequential(Patched(4, 4))
    assert Stillness(model).holds()
    model[0].forward = lambda x: x
    assert not Stillness(model).holds()
    model[0].forward = types.MethodType(Patched.forward, model[0])
    assert Stillness(model).holds(), "its class's own"
    Patched.forward = lambda self, x: x  # type: ignore[method-assign,assignment]
    Patched.__module__ = "elsewhere"
    assert not Stillness(model).holds()


def test_a_tools_forward_around_ours_is_the_tools_although_it_bears_our_mark() -> None:
    block = nn.Linear(4, 4)
    model = nn.Sequential(block)
    with blockswap.attach(model, device="cpu", blocks=[block]):
        ours = block.forward
        assert hasattr(ours, OURS)
        assert Stillness(model).holds()
        block.forward = functools.wraps(ours)(lambda x: ours(x))
        assert hasattr(block.forward, OURS)
        assert not Stillness(model).holds()
        block.forward = ours
