"""Residents in blocks of their own: what was placed but never filled is filled later."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import nn

import blockswap
from blockswap.errors import DeviceError
from blockswap.placement import Placement
from tests.accelerator.test_elastic import inputs, ready
from tests.accelerator.test_sessions import Chain

WIDTHS = [512] * 17


@torch.no_grad()
@pytest.mark.parametrize("error", [KeyboardInterrupt, DeviceError])
def test_after_a_change_of_plan_that_was_broken_off_every_bit_is_right(
    accelerator: ModuleType, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    model = Chain(WIDTHS, seed=1)
    expected = model(inputs())
    with ready(model) as session:
        assert session.report().resident_bytes > 0
        session.vacate()
        original, copies = Placement.copy, []

        def copy(placement: Placement, leaf: int) -> None:
            copies.append(leaf)
            if len(copies) == 3:
                raise error("no copy")
            original(placement, leaf)

        monkeypatch.setattr(Placement, "copy", copy)
        if error is KeyboardInterrupt:
            with pytest.raises(KeyboardInterrupt):
                model(inputs().to("fake"))
        for _ in range(3):
            assert torch.equal(model(inputs().to("fake")).cpu(), expected)
        assert len(copies) > 3


class Skipping(nn.Module):
    """Asks a layer that it skips where it lies."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Sequential(nn.Linear(256, 256), nn.Tanh()) for _ in range(6)]
        self.layers = nn.ModuleList(layers).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for index, layer in enumerate(self.layers):
            x = x.to(layer[0].weight.device) if index == 3 else layer(x)
        return x


@torch.no_grad()
def test_a_layer_that_does_not_run_tells_the_device_it_would_run_on(
    accelerator: ModuleType,
) -> None:
    model, x = Skipping(), torch.randn(2, 256)
    expected = model(x)
    with blockswap.attach(model, device="fake", offload="1GB", check=True):
        for _ in range(14):
            assert torch.equal(model(x.to("fake")).cpu(), expected)
