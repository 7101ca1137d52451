"""Images are laid out anew in the order in which they run: nothing is lost, whatever comes between."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import blockswap
from blockswap import _C

WIDTH = 64


class Backwards(nn.Module):
    """Declares its layers in another order than it runs them."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(WIDTH, WIDTH)
        self.middle = nn.Linear(WIDTH, WIDTH)
        self.first = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.middle(torch.tanh(self.first(x)))))


def model_and_inputs() -> tuple[nn.Module, list[torch.Tensor], list[torch.Tensor]]:
    torch.manual_seed(3)
    model = nn.Sequential(*(Backwards() for _ in range(5))).requires_grad_(False)
    inputs = [torch.randn(rows, WIDTH) for rows in (2, 3)]
    return model, inputs, [model(x) for x in inputs]


def places(model: nn.Module) -> list[int]:
    """Where the weights of the first block lie, in the order in which they run."""
    block = model[0]  # type: ignore[index]
    return [layer.weight.data_ptr() for layer in (block.first, block.middle, block.last)]


def test_after_the_first_step_weights_lie_in_the_order_in_which_they_run() -> None:
    model, (x, _), (wanted, _) = model_and_inputs()
    with blockswap.attach(model, device="cpu", offload="1GiB", blocks=["*"]):
        assert places(model) == sorted(places(model), reverse=True)
        for _ in range(4):
            assert torch.equal(model(x), wanted)
        assert places(model) == sorted(places(model))


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_broken_off_while_they_move_every_bit_is_right_for_every_shape(
    monkeypatch: pytest.MonkeyPatch, error: type[BaseException], when: str
) -> None:
    model, inputs, wanted = model_and_inputs()
    original, calls = _C.Binding.rearrange, []

    def rearrange(binding: Any, *args: Any) -> None:
        calls.append(when)
        if when == "after" or len(calls) > 1:
            original(binding, *args)
        if len(calls) == 1:
            raise error("broken off")

    monkeypatch.setattr(_C.Binding, "rearrange", rearrange)
    with blockswap.attach(model, device="cpu", offload="1GiB", blocks=["*"]):
        model(inputs[0])
        with pytest.raises(error, match="broken off"):
            model(inputs[0])
        for x, expected in zip([*inputs, inputs[0]], [*wanted, wanted[0]], strict=True):
            for _ in range(4):
                assert torch.equal(model(x), expected)
    assert all(torch.equal(model(x), y) for x, y in zip(inputs, wanted, strict=True))


def test_what_somebody_holds_a_tensor_over_stays_where_it_is() -> None:
    model, (x, _), (wanted, _) = model_and_inputs()
    with blockswap.attach(model, device="cpu", offload="1GiB", blocks=["*"]):
        held = model[0].middle.weight.data  # type: ignore[index, union-attr]
        values = held.clone()
        for _ in range(4):
            assert torch.equal(model(x), wanted)
        assert torch.equal(held, values)
        assert places(model) == sorted(places(model), reverse=True)
