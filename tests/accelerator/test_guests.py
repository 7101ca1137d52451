"""Components that compute whole: what is written to them while they are on the device is kept."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

import blockswap
from blockswap.errors import ConfigError
from blockswap.guests import Guest
from tests.pipelines import draw, make, with_large_encoder
from tests.test_pipeline_exchange import other_vae


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


class Mixed(nn.Module):
    """Weights of all kinds: strided, tied by their bytes, with gaps, empty; and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.randn(32, 32))
        self.tied = nn.Parameter(self.one.detach()[4:])
        self.gaps = nn.Parameter(torch.randn(32, 32)[:, ::2])
        self.none = nn.Parameter(torch.empty(0))
        self.conv = nn.Conv2d(8, 16, 3).to(memory_format=torch.channels_last)
        self.low = nn.Linear(64, 64, dtype=torch.bfloat16)
        self.register_buffer("count", torch.tensor(7))
        self.register_buffer("last", torch.empty(0))

    def tensors(self) -> dict[str, torch.Tensor]:
        return {**dict(self.named_parameters()), **dict(self.named_buffers())}


@torch.no_grad()
def test_weights_come_from_pinned_memory_and_stay_what_they_were(accelerator: ModuleType) -> None:
    module = Mixed()
    objects = module.tensors()
    before = {name: (t.detach().clone(), t.stride()) for name, t in objects.items()}
    guest = Guest("mixed", module, torch.empty(0, device="fake").device, pins=True)
    guest.pin()
    tied = module.one.nbytes + module.tied.nbytes + module.gaps.nbytes
    assert guest.report().pinned_bytes >= guest.weight_bytes - tied
    accelerator.set_copy_delay(0.0, seconds_per_copy=0.02)
    for _ in range(2):
        guest.enter()
        with accelerator.stream(accelerator.Stream()):  # other than the one that copied
            there = {name: tensor * 1 for name, tensor in module.tensors().items()}
            accelerator.synchronize()
        for name, tensor in module.tensors().items():
            assert tensor is objects[name] and tensor.device.type == "fake"
            assert torch.equal(there[name].cpu(), before[name][0]), name
        guest.leave()
    for name, tensor in module.tensors().items():
        assert tensor is objects[name] and tensor.device.type == "cpu"
        assert torch.equal(tensor, before[name][0]) and tensor.stride() == before[name][1], name
    module.tied.data[0] = 5.0
    assert (module.one[4] == 5.0).all()


@torch.no_grad()
def test_what_is_written_in_a_turn_is_kept_in_pinned_memory_and_after_it_is_unpinned(
    accelerator: ModuleType,
) -> None:
    module = nn.Linear(8, 8)
    expected = module.weight.detach().clone() * 2
    guest = Guest("linear", module, torch.empty(0, device="fake").device, pins=True)
    guest.pin()
    guest.enter()
    module.weight.data *= 2
    guest.leave()
    assert torch.equal(module.weight, expected)
    guest.unpin()
    assert guest.report().pinned_bytes == 0
    del guest
    gc.collect()
    assert torch.equal(module.weight, expected)  # its memory lives as long as it does
    module.weight += 1
    assert torch.equal(module.weight, expected + 1)


def test_memory_of_components_that_nobody_uses_is_given_back(accelerator: ModuleType) -> None:
    module = nn.Linear(8, 8)
    guest = Guest("linear", module, torch.empty(0, device="fake").device, pins=True)
    guest.pin()
    assert guest._home is not None
    arena = weakref.ref(guest._home.arena)
    guest.unpin()
    assert arena() is not None, "weights lie in it"
    del guest, module
    gc.collect()
    assert arena() is None


@pytest.mark.parametrize("host_memory", [None, "8MiB"])
def test_components_are_pinned_unless_the_user_bounds_what_is(
    accelerator: ModuleType, base: int, tmp_path: Path, host_memory: str | None
) -> None:
    pipe, call = make("flux", tmp_path)
    expected = draw(pipe, call, height=64, width=64)
    options = {} if host_memory is None else {"host_memory": host_memory}
    with blockswap.attach(pipe, device="fake", offload="4MB", **options) as session:
        assert np.array_equal(draw(pipe, call, height=64, width=64), expected)
        for dtype in torch.float64, torch.float32:
            for guest in session.report().guests.values():
                pinned = guest.pinned_bytes / guest.weight_bytes  # with what aligns them
                assert pinned == (0 if host_memory else pytest.approx(1.0, abs=0.01))
            pipe.to(dtype)
        session.pause()
        assert all(guest.pinned_bytes == 0 for guest in session.report().guests.values())
    assert np.array_equal(draw(pipe, call, height=64, width=64), expected)


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


def test_vae_that_a_call_upcasts_for_decoding_is_low_precision_again_and_pinned(
    accelerator: ModuleType, tmp_path: Path
) -> None:
    (right, call), (pipe, _) = make("sdxl", tmp_path), make("sdxl", tmp_path)
    call |= {"height": 64, "width": 64}
    for each in (right, pipe):
        each.to(torch.float16)
        each.vae.register_to_config(force_upcast=True)
    right.to("fake")
    expected = [draw(right, call) for _ in range(2)]
    with blockswap.attach(pipe, device="fake", offload="4MB") as session:
        for picture in expected:
            assert np.array_equal(draw(pipe, call), picture)
            assert all(
                p.dtype == q.dtype == torch.float16
                for p, q in zip(pipe.vae.parameters(), right.vae.parameters(), strict=True)
            )
            home = next(guest for guest in session._guests if guest.name == "vae")._home
            assert home is not None and all(home.holds(p) for p in pipe.vae.parameters())
    assert {p.dtype for p in pipe.vae.parameters()} == {torch.float16}
    assert np.array_equal(draw(pipe.to("fake"), call), expected[0])


@torch.no_grad()
@pytest.mark.parametrize("pins", [False, True])
@pytest.mark.parametrize(
    "edit",
    [
        lambda vae: vae.to(torch.float64),
        lambda vae: vae.to(memory_format=torch.channels_last),
        lambda vae: [setattr(p, "data", p.data.new_ones(2, 3)) for p in vae.parameters()],
    ],
    ids=["dtype", "memory format", "shape"],
)
def test_other_dtype_layout_or_shape_given_in_a_turn_stays(
    accelerator: ModuleType, pins: bool, edit: Callable[[Any], Any], tmp_path: Path
) -> None:
    (pipe, _), (right, _) = make("sdxl", tmp_path), make("sdxl", tmp_path)
    objects = list(pipe.vae.parameters())
    guest = Guest("vae", pipe.vae, torch.empty(0, device="fake").device, pins)
    guest.pin()
    for turn in range(2):
        guest.enter()
        if turn == 0:
            edit(pipe.vae)
        guest.leave()
    edit(right.vae)
    for i, (p, q) in enumerate(zip(pipe.vae.parameters(), right.vae.parameters(), strict=True)):
        assert p is objects[i]
        assert p.device.type == "cpu"
        assert (p.dtype, p.stride()) == (q.dtype, q.stride())
        assert torch.equal(p, q)


@pytest.mark.parametrize("host_memory", [None, "8MiB"])
def test_attaching_and_drawing_in_inference_mode_leaves_weights_that_can_be_trained(
    accelerator: ModuleType, base: int, tmp_path: Path, host_memory: str | None
) -> None:
    pipe, call = make("flux", tmp_path)
    call |= {"height": 64, "width": 64}
    with_large_encoder(pipe)  # streams
    given = other_vae(pipe)
    parts = (*pipe.components.values(), given)
    models = [part for part in parts if isinstance(part, nn.Module)]
    cap = base + 28 * 2**20
    given.to("fake")  # goes to host memory when the pipeline is given it
    options = {} if host_memory is None else {"host_memory": host_memory}

    def inference() -> list[torch.Tensor]:
        tensors = [t for model in models for t in [*model.parameters(), *model.buffers()]]
        return [tensor for tensor in tensors if tensor.is_inference()]

    with torch.inference_mode():
        session = blockswap.attach(pipe, device="fake", vram=cap, **options)
        assert inference() == []
        draw(pipe, call)
        pipe.vae = given
        assert inference() == []
        draw(pipe, call)
        pipe.vae.encode(torch.zeros(1, 3, 64, 64, device="fake"))  # its turn goes on
        assert inference() == []
        session.pause()
        session.resume()
        assert inference() == []
        session.detach()
    assert inference() == []
    for model in (pipe.text_encoder, pipe.text_encoder_2):
        model.requires_grad_(True)
        output = model(torch.zeros(1, 4, dtype=torch.long)).last_hidden_state
        output.sum().backward()
        assert next(model.parameters()).grad is not None


@pytest.mark.parametrize("name", ["vae", "text_encoder"])
def test_component_made_in_inference_mode_is_refused_by_name_and_an_ordinary_one_is_not(
    accelerator: ModuleType, name: str, tmp_path: Path
) -> None:
    (pipe, call), (right, _) = make("flux", tmp_path), make("flux", tmp_path)
    call |= {"height": 64, "width": 64}
    expected = draw(right.to("fake"), call)
    ordinary = getattr(pipe, name)
    with torch.inference_mode():
        made_there = copy.deepcopy(ordinary)
    refused = pytest.raises(
        ConfigError, match=rf"torch\.inference_mode\(\), the first is 'pipe\.{name}\.\w+.*outside"
    )
    setattr(pipe, name, made_there)
    with refused:
        blockswap.attach(pipe, device="fake", offload="4MB")
    setattr(pipe, name, ordinary)
    with blockswap.attach(pipe, device="fake", offload="4MB"):
        with refused:
            setattr(pipe, name, made_there)
        assert getattr(pipe, name) is ordinary
        assert np.array_equal(draw(pipe, call), expected)
