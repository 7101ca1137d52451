"""The device fails for good: giving a model back leaves an ordinary one on the host, and says so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import blockswap
from blockswap import _C, fixed
from blockswap.errors import DeviceError
from blockswap.guests import Guest
from tests.accelerator.test_sessions import STEPS, Chain
from tests.pipelines import draw, make

TEXT = "the driver said: device-side assert triggered"


class Failing(_C.Engine):  # type: ignore[misc]
    """An engine whose device answers nothing any more once it is broken."""

    is_broken = False

    def stop(self) -> None:
        self._refuse()
        super().stop()

    def copy_fixed(self, *args: Any) -> None:
        self._refuse()
        super().copy_fixed(*args)

    def _refuse(self) -> None:
        if Failing.is_broken:
            raise DeviceError(TEXT)


@pytest.fixture(autouse=True)
def failing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blockswap.model_state._C.Engine", Failing)
    monkeypatch.setattr(Failing, "is_broken", False)


def attached(device: str = "cpu") -> tuple[Chain, Chain, blockswap.Session]:
    """A model whose plan is settled, and its unswapped twin."""
    model, right = (Chain([256] * 5, seed=1).eval() for _ in range(2))
    for each in (model, right):
        each.register_buffer("scale", torch.ones(3))
    model.to(device)
    session = blockswap.attach(model, device="fake", check=True, offload="512KiB")
    for _ in range(STEPS):
        model(inputs().to("fake"))
    assert session.state == "ready"
    return model, right, session


def inputs() -> torch.Tensor:
    return torch.randn(4, 256, generator=torch.Generator().manual_seed(1))


def assert_ordinary(model: Chain, right: Chain) -> None:
    for module, other in zip(model.modules(), right.modules(), strict=True):
        assert sorted(vars(module)) == sorted(vars(other))
        assert type(module._parameters) is dict
        assert not module._forward_hooks and not module._forward_pre_hooks
    model.to("cpu")
    assert torch.equal(model(inputs()), right(inputs()))


@torch.no_grad()
@pytest.mark.parametrize("device", ["cpu", "fake"])
@pytest.mark.parametrize("act", ["detach", "pause"])
def test_model_is_given_back_and_the_error_is_told(
    accelerator: ModuleType, act: str, device: str
) -> None:
    model, right, session = attached(device)
    edit = torch.randn(256, 256, generator=torch.Generator().manual_seed(2))
    for each in (model, right):
        each.layers[2][0].weight.data.copy_(edit)
        each.layers[1][0].weight = torch.nn.Parameter(edit + 1, requires_grad=False)
    Failing.is_broken = True
    with pytest.raises(DeviceError, match=f"Chain is given back, .*{TEXT}.*host memory$"):
        getattr(session, act)()
    assert session.state == {"detach": "detached", "pause": "paused"}[act]
    assert_ordinary(model, right)
    session.detach()
    assert session.state == "detached"
    Failing.is_broken = False
    with blockswap.attach(model, device="fake", offload="512KiB"):
        assert torch.equal(model(inputs().to("fake")).cpu(), right(inputs()))


@torch.no_grad()
def test_weights_that_cannot_go_back_to_the_device_stay_on_the_host(
    accelerator: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, right, session = attached("fake")
    with monkeypatch.context() as patch:
        fails_after(patch, 3)
        with pytest.raises(DeviceError, match=r"out of memory.*host memory$"):
            session.detach()
    places = {p.device.type for layer in model.layers for p in layer[0].parameters()}
    assert places == {"cpu"}
    assert_ordinary(model, right)


def fails_after(patch: pytest.MonkeyPatch, count: int) -> None:
    """Let so many parameters go to their origin, and no more."""
    set_data: Callable[[torch.Tensor, torch.Tensor], None] = _C.set_data
    left = [count]

    def refuse(parameter: torch.Tensor, data: torch.Tensor) -> None:
        left[0] -= data.device.type == "fake"
        if left[0] < 0 and data.device.type == "fake":
            raise torch.OutOfMemoryError("fake out of memory")
        set_data(parameter, data)

    patch.setattr("blockswap.giving_back._C.set_data", refuse)


@torch.no_grad()
def test_tensors_that_only_the_device_has_are_named(
    accelerator: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, right, session = attached()
    Failing.is_broken = True

    def refuse(*_: object) -> None:
        raise RuntimeError(TEXT)

    with monkeypatch.context() as patch:
        patch.setattr(fixed.FixedTensors, "_move", refuse)
        with pytest.raises(DeviceError, match=r"but 1 tensors .*'scale': load the model again"):
            session.detach()
    assert session.state == "detached"
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert_ordinary(model, right)


def test_pipeline_is_given_back_whole_in_the_middle_of_a_turn(
    accelerator: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (pipe, call), (right, _) = make("flux", tmp_path), make("flux", tmp_path)
    call |= {"height": 64, "width": 64, "output_type": "latent"}
    session = blockswap.attach(pipe, device="fake", offload="4MB")
    draw(pipe, call)
    pipe.encode_prompt("a red fox", "a red fox")
    read = pipe.text_encoder_2.get_input_embeddings().weight
    assert read.device.type == "fake"

    def refuse(*_: object) -> None:
        raise RuntimeError(TEXT)

    Failing.is_broken = True
    with monkeypatch.context() as patch:
        patch.setattr(Guest, "_values_of", refuse)
        with pytest.raises(DeviceError, match=f"FluxTransformer2DModel is given back, .*{TEXT}"):
            session.detach()
    assert session.state == "detached"
    for part in [p for p in pipe.components.values() if isinstance(p, torch.nn.Module)]:
        for module in part.modules():
            assert type(module._parameters) is dict
            assert not module._forward_pre_hooks
            assert "encode" not in vars(module) and "forward" not in vars(module)
            assert all(p.device.type == "cpu" for p in module.parameters())
    assert np.array_equal(draw(pipe, call), draw(right, call))
