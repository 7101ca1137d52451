"""What an attached pipeline is given comes for its turn, under the cap, and leaves."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxImg2ImgPipeline
from torch import nn

import blockswap
from blockswap.errors import CapError
from blockswap.guests import Guest
from tests.accelerator.test_pipelines import MIB, devices, on_fake
from tests.pipelines import draw, make, with_large_encoder
from tests.test_pipeline_exchange import IMAGE, other_denoiser, other_vae
from tests.test_pipeline_parts import from_file, save_encoder


def all_devices(pipe: Any) -> set[str]:
    parts = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    return {t.device.type for part in parts for t in [*part.parameters(), *part.buffers()]}


@torch.no_grad()
@pytest.mark.parametrize("kind", ["sdxl", "flux"])
def test_image_encoder_comes_for_its_turn_under_the_cap_and_leaves(
    accelerator: ModuleType, kind: str, tmp_path: Path
) -> None:
    (right, call), (pipe, _) = make(kind, tmp_path), make(kind, tmp_path)
    call |= {"height": 64, "width": 64, "output_type": "latent", "ip_adapter_image": [IMAGE]}
    save_encoder(tmp_path / "image_encoder")
    adapt = from_file(SimpleNamespace(kind=kind, right=right, folder=tmp_path), encoder=True)
    adapt(right)
    expected = on_fake(right, call)
    cap = accelerator.memory_allocated() + 48 * MIB
    seen: list[str] = []
    with blockswap.attach(pipe, device="fake", vram=cap, check=True) as session:
        draw(pipe, {name: value for name, value in call.items() if name != "ip_adapter_image"})
        held = accelerator.memory_allocated()
        adapt(pipe)
        encoder = pipe.image_encoder
        assert devices(pipe)["image_encoder"] == "cpu", "diffusers loads it to the device"
        assert accelerator.memory_allocated() < held + encoder.get_memory_footprint()
        with encoder.register_forward_pre_hook(
            lambda *_: seen.append(encoder.visual_projection.weight.device.type)
        ):
            for _ in range(3):
                assert np.array_equal(draw(pipe, call), expected)
                assert devices(pipe)["image_encoder"] == "cpu"
        report = session.report().guests["image_encoder"]
        assert set(seen) == {"fake"}
        assert report.turns >= 3
        assert report.peak_bytes is not None
        assert report.weight_bytes < report.peak_bytes <= cap
    assert all_devices(pipe) == {"cpu"}


@torch.no_grad()
def test_other_vae_text_encoder_and_denoiser_draw_on_the_device(
    accelerator: ModuleType, tmp_path: Path
) -> None:
    (right, call), (pipe, _) = make("flux", tmp_path), make("flux", tmp_path)
    call |= {"height": 64, "width": 64}
    plain = on_fake(right, call)

    def exchange(pipe: Any) -> None:
        pipe.vae = other_vae(pipe).to("fake")  # as users do who think of it
        pipe.transformer = other_denoiser(pipe)
        with_large_encoder(pipe)  # streams

    exchange(right)
    expected = on_fake(right, call)
    assert not np.array_equal(expected, plain)
    cap = accelerator.memory_allocated() + 20 * MIB
    with blockswap.attach(pipe, device="fake", vram=cap, check=True) as session:
        assert np.array_equal(draw(pipe, call), plain)
        exchange(pipe)
        assert devices(pipe)["vae"] == "cpu"
        for _ in range(3):
            assert np.array_equal(draw(pipe, call), expected)
        report = session.report()
        assert list(report.parts) == ["transformer", "text_encoder_2"]
        assert all(0 < part.peak_device_bytes <= cap for part in report.parts.values())
        assert report.guests["vae"].peak_bytes <= cap
    assert all_devices(pipe) == {"cpu"}


def test_component_above_the_cap_is_refused_and_the_old_one_stays(
    accelerator: ModuleType, tmp_path: Path
) -> None:
    pipe, call = make("flux", tmp_path)
    call |= {"height": 64, "width": 64}
    cap = accelerator.memory_allocated() + 20 * MIB
    with blockswap.attach(pipe, device="fake", vram=cap):
        plain, vae = draw(pipe, call), pipe.vae
        large = other_vae(pipe)
        large.more = nn.Linear(cap // 4 // 1024, 1024)
        for given in (large, large.to("fake")):
            with pytest.raises(CapError, match=r"pipe\.vae has .* computes as a whole"):
                pipe.vae = given
            assert pipe.vae is vae
        del large, given
        assert np.array_equal(draw(pipe, call), plain)


@torch.no_grad()
def test_dtype_of_a_pipeline_made_meanwhile_reaches_a_component_in_its_turn(
    accelerator: ModuleType, tmp_path: Path
) -> None:
    (right, call), (pipe, _) = make("flux", tmp_path), make("flux", tmp_path)
    call |= {"height": 64, "width": 64}
    plain = on_fake(right, call)
    expected = on_fake(right.to(torch.float64), call)
    assert not np.array_equal(expected, plain)
    with blockswap.attach(pipe, device="fake", offload="4MB", check=True):
        assert np.array_equal(draw(pipe, call), plain)
        pipe.encode_prompt("a red fox", None)
        assert devices(pipe)["text_encoder_2"] == "fake"
        FluxImg2ImgPipeline.from_pipe(pipe, dtype=torch.float64)
        for _ in range(2):
            assert np.array_equal(draw(pipe, call), expected)
    assert all_devices(pipe) == {"cpu"}
    assert {p.dtype for p in pipe.text_encoder_2.parameters()} == {torch.float64}


def test_dtype_of_a_pipeline_made_while_paused_pins_nothing_before_resume(
    accelerator: ModuleType, tmp_path: Path
) -> None:
    (right, call), (pipe, _) = make("flux", tmp_path), make("flux", tmp_path)
    call |= {"height": 64, "width": 64}
    expected = on_fake(right.to(torch.float64), call)
    with blockswap.attach(pipe, device="fake", offload="4MB") as session:
        session.pause()
        FluxImg2ImgPipeline.from_pipe(pipe, dtype=torch.float64)
        assert all(guest.pinned_bytes == 0 for guest in session.report().guests.values())
        session.resume()
        for guest in session.report().guests.values():
            assert guest.pinned_bytes >= guest.weight_bytes
        assert np.array_equal(draw(pipe, call), expected)


@torch.no_grad()
@pytest.mark.parametrize("called", [0, 1])
@pytest.mark.parametrize("shared", [("text_encoder", "vae"), ("text_encoder", "text_encoder_2")])
def test_what_two_pipelines_share_comes_once_and_leaves_before_all_else_of_either_begins(
    accelerator: ModuleType,
    shared: tuple[str, ...],
    called: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (pipe, call), (other, _) = make("flux", tmp_path), make("flux", tmp_path)
    call |= {"height": 64, "width": 64}
    for name in shared:
        setattr(other, name, getattr(pipe, name))
    other.transformer = other_denoiser(pipe)
    pipes = [pipe, other]
    expected = [on_fake(each, call) for each in pipes]
    sessions = [blockswap.attach(each, device="fake", offload="4MB", check=True) for each in pipes]
    came: list[str] = []
    seen: list[set[str]] = []
    enter = Guest.enter

    def enter_and_tell(guest: Guest) -> None:
        enter(guest)
        came.extend([guest.name] if guest._away else [])

    def look(part: str) -> Any:
        others = set(devices(pipe)) - {part, "transformer"}
        return lambda *_: seen.append({devices(pipes[called])[name] for name in others})

    monkeypatch.setattr(Guest, "enter", enter_and_tell)
    encoder, denoiser = pipes[called].text_encoder_2.encoder, pipes[called].transformer
    encoder.block[0].register_forward_pre_hook(look("text_encoder_2"))
    denoiser.transformer_blocks[0].register_forward_pre_hook(look("transformer"))
    for each in [called] * 3 + [1 - called]:
        assert np.array_equal(draw(pipes[each], call), expected[each])
    assert len(seen) > 12 and all(kinds == {"cpu"} for kinds in seen)
    assert came == ["text_encoder", "text_encoder_2", "vae"] * 4
    for session in sessions:
        session.detach()
    assert all_devices(pipe) | all_devices(other) == {"cpu"}
