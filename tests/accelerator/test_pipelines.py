"""Whole pipelines on the fake accelerator: the other components come for their turn and leave."""

from __future__ import annotations

import itertools
import json
import sys
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
from tests.pipelines import draw, make

MIB = 2**20


def devices(pipe: Any) -> dict[str, str]:
    """The device of each component's first parameter."""
    parts = pipe.components.items()
    return {n: next(p.parameters()).device.type for n, p in parts if isinstance(p, nn.Module)}


def on_fake(pipe: Any, call: dict[str, Any]) -> np.ndarray:
    """What the unswapped pipeline draws on the fake device."""
    pipe.to("fake")
    expected = draw(pipe, call)
    pipe.to("cpu")
    return expected


@pytest.mark.parametrize("kind", ["sdxl", "flux", "sd3", "qwen"])
def test_pipeline_draws_the_same_picture(
    accelerator: ModuleType, kind: str, tmp_path: Path
) -> None:
    pipe, call = make(kind, tmp_path)
    call = {k: v.to("fake") if isinstance(v, torch.Tensor) else v for k, v in call.items()}
    expected = on_fake(pipe, call)
    with blockswap.attach(pipe, device="fake", offload="4MB", check=True) as session:
        assert pipe._execution_device.type == "fake"
        for _ in range(3):
            assert np.array_equal(draw(pipe, call), expected)
        name = next(iter(session.sessions))
        others = {n: d for n, d in devices(pipe).items() if n != name}
        assert set(others.values()) == {"cpu"}
    assert set(devices(pipe).values()) == {"cpu"}


def test_cap_holds_over_text_encoders_and_denoiser(accelerator: ModuleType, tmp_path: Path) -> None:
    pipe, call = make("flux", tmp_path)
    call["output_type"] = "latent"  # this VAE's activations would be most of it
    expected = on_fake(pipe, call)
    weights = sum(p.nbytes for p in pipe.transformer.parameters())
    before = accelerator.memory_allocated()
    cap = before + weights // 2 + 8 * MIB
    with blockswap.attach(pipe, device="fake", vram=cap) as session:
        for _ in range(2):
            draw(pipe, call)
        accelerator.reset_peak_memory_stats()
        assert np.array_equal(draw(pipe, call), expected)
        assert session.state == "ready"
        assert session.report().parts["transformer"].streamed_bytes > 0
        assert accelerator.max_memory_allocated() <= cap


def test_report_tells_the_turns_and_peaks_of_what_computes_whole(
    accelerator: ModuleType, tmp_path: Path
) -> None:
    pipe, call = make("flux", tmp_path)
    weights = sum(p.nbytes for p in pipe.transformer.parameters())
    cap = accelerator.memory_allocated() + weights // 2 + 64 * MIB
    pipe.text_encoder.heavy = nn.Parameter(torch.empty(cap * 2 // 3 // 4), requires_grad=False)

    def take_much(*_: object) -> None:
        torch.empty(cap - 16 * MIB, dtype=torch.uint8, device="fake")

    pipe.vae.decoder.conv_in.register_forward_hook(take_much)
    with blockswap.attach(pipe, device="fake", vram=cap) as session:
        for _ in range(2):
            draw(pipe, call)
        report = session.report()
        assert set(report.guests) == {"vae", "text_encoder", "text_encoder_2"}
        for guest in report.guests.values():
            assert guest.turns == 2
            assert guest.peak_bytes is not None
            assert guest.weight_bytes <= guest.peak_bytes <= cap
        assert report.guests["vae"].peak_bytes > cap - 16 * MIB
        assert "pipe.vae: " in str(report)
        assert json.loads(report.to_json())["vae"]["turns"] == 2
        # What the others took is not the denoiser's peak.
        peak = report.parts["transformer"].peak_allocated_bytes
        assert peak < cap * 2 // 3
        z = torch.randn(1, pipe.vae.config.latent_channels, 4, 4, device="fake")
        with torch.no_grad():
            pipe.vae.decode(z.to(pipe.vae.dtype))  # its turn goes on until somebody else's begins
        report = session.report()
        assert report.guests["vae"].turns == 3
        assert report.parts["transformer"].peak_allocated_bytes == peak


@torch.no_grad()
def test_a_component_that_passes_the_cap_is_an_error_and_the_next_call_is_right(
    accelerator: ModuleType, tmp_path: Path
) -> None:
    pipe, call = make("flux", tmp_path)
    expected = on_fake(pipe, call)
    weights = sum(p.nbytes for p in pipe.transformer.parameters())
    cap = accelerator.memory_allocated() + weights // 2 + 32 * MIB
    taken = [cap]

    def take_much(*_: object) -> None:
        torch.empty(taken[0], dtype=torch.uint8, device="fake")

    with blockswap.attach(pipe, device="fake", vram=cap):
        handle = pipe.vae.decoder.conv_in.register_forward_hook(take_much)
        with pytest.raises(torch.OutOfMemoryError) as raised:
            draw(pipe, call)
        if sys.version_info >= (3, 11):
            assert "enable_tiling()" in raised.value.__notes__[-1]
        taken[0] = 1
        assert np.array_equal(draw(pipe, call), expected)
        handle.remove()
    assert set(devices(pipe).values()) == {"cpu"}


@torch.no_grad()
def test_a_component_bounds_pytorch_only_while_it_computes(
    accelerator: ModuleType, tmp_path: Path
) -> None:
    pipe, call = make("flux", tmp_path)
    cap = accelerator.memory_allocated() + 128 * MIB
    seen: list[float] = []

    def look(*_: object) -> None:
        seen.append(accelerator.get_per_process_memory_fraction())
        if len(seen) == 2:
            raise RuntimeError("the decoder has failed")

    pipe.vae.decoder.conv_in.register_forward_hook(look)
    session = blockswap.attach(pipe, device="fake", vram=cap)
    z = torch.randn(1, pipe.vae.config.latent_channels, 4, 4, device="fake").to(pipe.vae.dtype)
    pipe.vae.decode(z)
    assert seen[0] < 1.0
    assert accelerator.get_per_process_memory_fraction() == 1.0
    with pytest.raises(RuntimeError, match="the decoder has failed"):
        draw(pipe, call)
    assert accelerator.get_per_process_memory_fraction() == 1.0
    session.detach()


@torch.no_grad()
def test_a_component_with_parts_named_as_its_calls_is_left_alone(accelerator: ModuleType) -> None:
    class Coder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encode = nn.Linear(8, 8)

        @staticmethod
        def decode(x: torch.Tensor) -> torch.Tensor:
            return x

    coder = Coder()
    before = sorted(vars(coder))
    guest = Guest("coder", coder, torch.device("fake", 0))
    guest.watch(SimpleNamespace(begin=lambda _: None))  # type: ignore[arg-type]
    assert coder.decode(torch.ones(1)) == 1
    guest.unwatch()
    assert sorted(vars(coder)) == before


def test_moving_the_pipeline_away_leaves_it_streamed(
    accelerator: ModuleType, tmp_path: Path
) -> None:
    pipe, call = make("flux", tmp_path)
    expected = on_fake(pipe, call)
    with blockswap.attach(pipe, device="fake", offload=4):
        draw(pipe, call)
        pipe.to("cpu")
        assert np.array_equal(draw(pipe, call), expected)


def test_a_call_of_one_of_two_pipelines_leaves_nothing_of_both_on_the_device(
    accelerator: ModuleType, tmp_path: Path
) -> None:
    pipe, call = make("flux", tmp_path)
    call |= {"height": 64, "width": 64}
    other = FluxImg2ImgPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    redrawn = call | {"image": torch.zeros(1, 3, 64, 64), "strength": 0.9}
    expected = on_fake(pipe, call), on_fake(other, redrawn)
    first = blockswap.attach(pipe, device="fake", offload="4MB")
    second = blockswap.attach(other, config=first.config)
    for _ in range(2):
        for each, given, picture in ((pipe, call, expected[0]), (other, redrawn, expected[1])):
            assert np.array_equal(draw(each, given), picture)
            left = {name: d for name, d in devices(each).items() if name != "transformer"}
            assert set(left.values()) == {"cpu"}
    first.detach()
    second.detach()


def test_weights_changed_during_a_turn_are_kept(accelerator: ModuleType) -> None:
    module = nn.BatchNorm1d(8)
    guest = Guest("bn", module, torch.empty(0, device="fake").device)
    guest.enter()
    assert module.running_mean.device.type == "fake"
    module(torch.full((4, 8), 3.0, device="fake"))
    guest.leave()
    assert module.running_mean.device.type == "cpu"
    assert torch.allclose(module.running_mean, torch.full((8,), 0.3))
    assert guest.num_bytes > 0


def test_component_that_does_not_fit_stays_where_it_was(accelerator: ModuleType) -> None:
    accelerator.set_limit(accelerator.memory_allocated() + MIB)
    module = nn.Sequential(*[nn.Linear(256, 256) for _ in range(8)])
    guest = Guest("big", module, torch.empty(0, device="fake").device)
    with pytest.raises(torch.OutOfMemoryError):
        guest.enter()
    assert {p.device.type for p in module.parameters()} == {"cpu"}


def test_component_above_the_cap_is_refused(accelerator: ModuleType, tmp_path: Path) -> None:
    pipe, _ = make("flux", tmp_path)
    with pytest.raises(CapError, match=r"pipe\.vae has .* computes as a whole, but the cap is"):
        blockswap.attach(pipe, device="fake", vram="200KiB")


def test_a_recording_shows_every_turn_its_peak_and_what_others_record_stays_right(
    accelerator: ModuleType, tmp_path: Path
) -> None:
    pipe, call = make("sdxl", tmp_path)
    call = {k: v.to("fake") if isinstance(v, torch.Tensor) else v for k, v in call.items()}
    expected = on_fake(pipe, call)
    cap = accelerator.memory_allocated() + 60 * MIB
    with blockswap.attach(pipe, device="fake", vram=cap) as session:
        while session.state != "ready":
            draw(pipe, call)
        (vae,) = (guest for guest in session._guests if guest.name == "vae")
        vae.peak_bytes = 0  # that of the next turn alone
        draw(pipe, call)
        plain = session.report()
        vae.peak_bytes = 0
        with session.record() as history:
            assert np.array_equal(draw(pipe, call), expected)
        recorded = session.report()
        num_moments = len(history.moments)
        draw(pipe, call)
        assert len(history.moments) == num_moments  # nobody records any more
    parts = [moment.part for moment in history.moments if moment.part]
    assert parts == ["text_encoder", "text_encoder_2", *["unet"] * 4, "vae"]
    ends = [after for before, after in itertools.pairwise(history.moments) if before.part == "unet"]
    assert all(0 < end.pool_bytes < end.peak_bytes <= cap for end in ends)
    assert max(e.peak_bytes for e in ends) <= recorded.parts["unet"].peak_allocated_bytes
    in_vae = next(a for b, a in itertools.pairwise(history.moments) if b.part == "vae")
    reported = recorded.guests["vae"].peak_bytes
    assert reported is not None and abs(in_vae.peak_bytes - reported) < MIB // 4
    # Another turn's, beside as many residents as it found room for.
    reported = plain.guests["vae"].peak_bytes
    assert reported is not None and abs(in_vae.peak_bytes - reported) < 4 * MIB
    # Each part's peak is its own: what follows the VAE's holds little.
    assert history.moments[-1].peak_bytes < in_vae.peak_bytes - 8 * MIB
    seconds = [moment.seconds for moment in history.moments]
    assert seconds == sorted(seconds)


def test_a_recording_ends_with_an_error_and_leaves_no_hook(
    accelerator: ModuleType, tmp_path: Path
) -> None:
    pipe, call = make("sdxl", tmp_path)
    with blockswap.attach(pipe, device="fake", offload="4MB") as session:
        hooks = len(pipe.unet._forward_hooks), len(pipe.unet._forward_pre_hooks)
        with pytest.raises(ValueError, match="height"), session.record() as history:
            pipe(**call | {"height": 65})
        assert (len(pipe.unet._forward_hooks), len(pipe.unet._forward_pre_hooks)) == hooks
        assert [moment.part for moment in history.moments] == ["", ""]
