"""Components that compute whole: what is written to them while they are on the device is kept."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

import blockswap
from blockswap.guests import Guest
from tests.pipelines import draw, make


@torch.no_grad()
def test_data_written_and_parameters_put_in_during_a_turn_are_kept(accelerator: ModuleType) -> None:
    module = nn.Linear(8, 8)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    guest = Guest("linear", module, torch.empty(0, device="fake").device)
    guest.enter()
    module.weight.data *= 2  # counts no version
    module.bias = nn.Parameter(module.bias + 1)
    module.register_parameter("more", nn.Parameter(module.bias + 1))
    guest.leave()
    assert {p.device.type for p in module.parameters()} == {"cpu"}
    assert torch.equal(module.weight, before["weight"] * 2)
    assert torch.equal(module.bias, before["bias"] + 1)
    assert type(module._parameters) is dict


@pytest.mark.parametrize("kind", ["sdxl", "flux"])
def test_a_call_leaves_no_component_to_be_copied_back(
    accelerator: ModuleType, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, call = make(kind, tmp_path)
    read: list[str] = []
    leave = Guest.leave

    def note(guest: Guest) -> None:
        read.extend(unit.name for unit in guest.gate.touched)
        leave(guest)

    monkeypatch.setattr(Guest, "leave", note)
    with blockswap.attach(pipe, device="fake", offload="4MB"):
        draw(pipe, call, height=64, width=64)
    assert read == []


def test_an_edit_after_a_component_ran_alone_counts(
    accelerator: ModuleType, tmp_path: Path
) -> None:
    pipe, call = make("flux", tmp_path)
    right, _ = make("flux", tmp_path)
    small = {"height": 64, "width": 64, "steps": 2}
    with blockswap.attach(pipe, device="fake", offload="4MB") as session:
        for each in (pipe, right):
            each.encode_prompt("a red fox", "a red fox")
            each.text_encoder_2.get_input_embeddings().weight.data *= 1.5
            each.transformer.proj_out.weight = nn.Parameter(each.transformer.proj_out.weight * 1.1)
            each.transformer.requires_grad_(False)
        assert np.array_equal(draw(pipe, call, **small), draw(right, call, **small))
        session.detach()
    assert {p.device.type for p in pipe.transformer.parameters()} == {"cpu"}
    assert np.array_equal(draw(pipe, call, **small), draw(right, call, **small))


def test_a_compiled_part_of_a_component_is_traced_whole_and_once(
    accelerator: ModuleType, tmp_path: Path
) -> None:
    pipe, call = make("flux", tmp_path)
    small = {"height": 64, "width": 64, "steps": 2}
    expected = draw(pipe, call, **small)
    traced = CompileCounter()
    pipe.vae.decoder = torch.compile(pipe.vae.decoder, backend=traced, fullgraph=True)
    with blockswap.attach(pipe, device="fake", offload="4MB"):
        for _ in range(3):
            assert np.array_equal(draw(pipe, call, **small), expected)
    assert traced.frame_count == 1
