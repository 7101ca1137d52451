"""Who reads a weight's values, and who only asks what it is."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType, SimpleNamespace
from typing import Any

import pytest
import torch

from blockswap.callers import reads_metadata


class Layer:
    """Notes for each read of ``weight`` what is to be told of it."""

    def __init__(self) -> None:
        self.told: list[bool] = []

    @property
    def weight(self) -> torch.Tensor:
        frame = sys._getframe(1)
        assert isinstance(frame, FrameType)
        self.told.append(reads_metadata(frame))
        return torch.ones(2, 3)


def of_t5(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    held = SimpleNamespace(wo=layer)
    if (
        isinstance(held.wo.weight, torch.Tensor)
        and x.dtype != held.wo.weight.dtype
        and held.wo.weight.dtype != torch.int8
    ):
        x = x.to(held.wo.weight.dtype)
    return x


HARMLESS: list[Callable[[Layer], Any]] = [
    lambda layer: layer.weight.dtype,
    lambda layer: layer.weight.shape[0],
    lambda layer: layer.weight.size(0),
    lambda layer: torch.zeros(2).to(layer.weight.device),
    lambda layer: isinstance(layer.weight, torch.Tensor),
    lambda layer: of_t5(layer, torch.zeros(1, dtype=torch.float64)),
]


def kept(layer: Layer) -> torch.Tensor:
    weight = layer.weight
    assert weight.dtype == torch.float32
    return weight


VALUES: list[Callable[[Layer], Any]] = [
    lambda layer: layer.weight,
    lambda layer: layer.weight + 1,
    lambda layer: layer.weight.data,
    lambda layer: layer.weight.float(),
    lambda layer: torch.add(layer.weight, torch.ones(3)),
    lambda layer: torch.add(layer.weight, other=layer.weight),
    lambda layer: [layer.weight, torch.Tensor],
    lambda layer: isinstance((layer.weight, 1), tuple),
    kept,
]


@pytest.mark.parametrize("read", HARMLESS)
def test_who_asks_what_a_weight_is_reads_no_values(read: Callable[[Layer], Any]) -> None:
    layer = Layer()
    read(layer)
    assert layer.told and all(layer.told)


@pytest.mark.parametrize("read", VALUES)
def test_whoever_gets_hold_of_a_weight_reads_its_values(read: Callable[[Layer], Any]) -> None:
    layer = Layer()
    read(layer)
    assert layer.told and not any(layer.told)
