"""Whole pipelines: the same picture while attached, no trace after."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.hooks import apply_group_offloading
from pipelines import draw, make

import blockswap
from blockswap.components import denoisers_of
from blockswap.errors import CapError, ConfigError, UseError

KINDS = ("sdxl", "flux", "wan", "sd3", "qwen")


def tree(pipe: Any) -> dict[str, Any]:
    """All that attaching might leave behind, by component and module."""
    seen: dict[str, Any] = {"pipe": sorted(vars(pipe))}
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module):
            for path, module in part.named_modules():
                seen[f"{name}.{path}"] = (
                    type(module),
                    sorted(vars(module)),
                    len(module._forward_hooks) + len(module._forward_pre_hooks),
                    [
                        (n, id(p), str(p.device))
                        for n, p in module._parameters.items()
                        if p is not None
                    ],
                    type(module._parameters),
                )
    return seen


@pytest.fixture
def flux(tmp_path: Path) -> tuple[Any, dict[str, Any]]:
    return make("flux", tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_pipeline_draws_the_same_picture_and_keeps_no_trace(kind: str, tmp_path: Path) -> None:
    pipe, call = make(kind, tmp_path)
    expected = draw(pipe, call)
    before = tree(pipe)  # a first call leaves its own attributes
    (name, denoiser), *_ = denoisers_of(pipe).items()
    weights = sum(p.nbytes for p in denoiser.parameters())
    offload = f"{weights // 2}B"
    with blockswap.attach(pipe, device="cpu", offload=offload, check=True) as session:
        for _ in range(3):
            assert np.array_equal(draw(pipe, call), expected)
        assert session.state == "ready"
        assert session.report().parts[name].streamed_bytes > 0
        assert f"pipe.{name}" in str(session.report())
        assert json.loads(session.report().to_json())[name]["state"] == "ready"
    assert session.state == "detached"
    assert tree(pipe) == before
    assert np.array_equal(draw(pipe, call), expected)


def test_attaching_again_returns_the_live_session_and_refuses_other_settings(
    flux: tuple[Any, dict[str, Any]],
) -> None:
    pipe, _ = flux
    session = blockswap.attach(pipe, device="cpu", offload=2)
    assert blockswap.attach(pipe, device="cpu", offload=2) is session
    with pytest.raises(UseError, match=r"FluxPipeline is attached with other settings \(offload"):
        blockswap.attach(pipe, device="cpu", offload=3)


def test_pause_gives_an_ordinary_pipeline_and_resume_streams_again(
    flux: tuple[Any, dict[str, Any]],
) -> None:
    pipe, call = flux
    expected = draw(pipe, call)
    session = blockswap.attach(pipe, device="cpu", offload=4)
    draw(pipe, call)
    session.pause()
    assert session.state == "paused"
    assert np.array_equal(draw(pipe, call), expected)
    session.resume()
    assert np.array_equal(draw(pipe, call), expected)
    assert session.sessions["transformer"].report().streamed_bytes > 0


def test_interrupted_call_leaves_the_pipeline_usable(flux: tuple[Any, dict[str, Any]]) -> None:
    pipe, call = flux
    expected = draw(pipe, call)
    session = blockswap.attach(pipe, device="cpu", offload=4)

    def interrupt(*_: Any) -> dict[str, Any]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw(pipe, call, callback_on_step_end=interrupt)
    assert np.array_equal(draw(pipe, call), expected)
    session.detach()
    assert np.array_equal(draw(pipe, call), expected)


def test_another_pipeline_over_the_same_model_streams_too(tmp_path: Path) -> None:
    from diffusers import StableDiffusionXLImg2ImgPipeline

    pipe, call = make("sdxl", tmp_path)
    call = {"prompt": call["prompt"], "image": torch.zeros(1, 3, 256, 256), "strength": 0.9}
    other = StableDiffusionXLImg2ImgPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    expected = draw(other, call)
    blockswap.attach(pipe, device="cpu", offload=4)
    session = blockswap.attach(other, device="cpu", offload=4)
    assert np.array_equal(draw(other, call), expected)
    assert session.sessions["unet"].report().steps > 0


def test_a_detached_pipeline_leaves_what_another_one_shares_with_it(tmp_path: Path) -> None:
    from diffusers import StableDiffusionXLImg2ImgPipeline

    pipe, call = make("sdxl", tmp_path)
    other = StableDiffusionXLImg2ImgPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    redrawn = {"prompt": call["prompt"], "image": torch.zeros(1, 3, 256, 256), "strength": 0.9}
    expected = draw(pipe, call), draw(other, redrawn)
    first = blockswap.attach(pipe, device="cpu", offload=4)
    second = blockswap.attach(other, device="cpu", offload=4)
    first.detach()
    assert (first.state, second.state) == ("detached", "learning")
    assert np.array_equal(draw(other, redrawn), expected[1])
    assert second.sessions["unet"].report().steps > 0
    second.detach()
    assert second.state == "detached"
    assert np.array_equal(draw(pipe, call), expected[0])
    assert np.array_equal(draw(other, redrawn), expected[1])
    assert "decode" not in vars(pipe.vae)


def test_lora_loaders_leave_the_pipeline_streamed(flux: tuple[Any, dict[str, Any]]) -> None:
    from diffusers.hooks import group_offloading

    pipe, call = flux
    expected = draw(pipe, call)
    session = blockswap.attach(pipe, device="cpu", offload=4)
    draw(pipe, call)
    # What load_lora_weights calls on every component after it changed one.
    group_offloading._maybe_remove_and_reapply_group_offloading(pipe.transformer)
    assert group_offloading._is_group_offload_enabled(pipe.transformer)
    assert np.array_equal(draw(pipe, call), expected)
    assert session.report().parts["transformer"].streamed_bytes > 0
    session.detach()
    assert not group_offloading._is_group_offload_enabled(pipe.transformer)


def test_pipeline_without_a_denoiser_is_refused_with_its_models(tmp_path: Path) -> None:
    pipe, _ = make("flux", tmp_path)
    pipe.transformer = None
    with pytest.raises(ConfigError, match=r"FluxPipeline has no transformer.*pipe\.vae"):
        blockswap.attach(pipe, device="cpu", offload=2)


def test_pipeline_under_model_offload_is_refused_before_anything_changes(
    flux: tuple[Any, dict[str, Any]],
) -> None:
    from accelerate import cpu_offload_with_hook

    pipe, _ = flux
    cpu_offload_with_hook(pipe.vae, execution_device="cpu")
    with pytest.raises(ConfigError, match=r"accelerate offloads pipe\.vae"):
        blockswap.attach(pipe, device="cpu", offload=2)
    assert not hasattr(pipe.transformer, "_blockswap_session")


def test_refused_denoiser_leaves_nothing_attached(flux: tuple[Any, dict[str, Any]]) -> None:
    pipe, _ = flux
    before = tree(pipe)
    with pytest.raises(ConfigError, match="offload=999"):
        blockswap.attach(pipe, device="cpu", offload=999)
    assert tree(pipe) == before


def test_cap_too_small_for_another_component_is_refused_by_name() -> None:
    class Pipe:
        def __init__(self) -> None:
            big = torch.nn.Linear(512, 512, device="meta")
            self.components = {"transformer": torch.nn.Linear(8, 8), "text_encoder": big}

    with pytest.raises(CapError, match=r"pipe\.text_encoder has 1.0 MiB.*cap is 512.0 KiB"):
        blockswap.attach(Pipe(), device="cpu", vram="512KiB")


HOW = {"onload_device": torch.device("cpu"), "offload_type": "leaf_level"}
WAYS = {
    "pipeline": lambda pipe: pipe.enable_group_offload(**HOW),
    "denoiser": lambda pipe: pipe.transformer.enable_group_offload(**HOW),
    "vae": lambda pipe: pipe.vae.enable_group_offload(**HOW),
    "function": lambda pipe: apply_group_offloading(pipe.transformer, **HOW),
    "part": lambda pipe: apply_group_offloading(pipe.transformer.transformer_blocks[1], **HOW),
    "whole": lambda pipe: apply_group_offloading(torch.nn.ModuleList([pipe.transformer]), **HOW),
}


@pytest.mark.parametrize("way", WAYS)
def test_group_offloading_is_refused_while_attached_and_allowed_after(
    way: str, flux: tuple[Any, dict[str, Any]]
) -> None:
    pipe, call = flux
    expected = draw(pipe, call)
    session = blockswap.attach(pipe, device="cpu", offload=2)
    before = tree(pipe)
    with pytest.raises(ConfigError, match=r"two owners of one weight.*session\.detach\(\)"):
        WAYS[way](pipe)
    assert tree(pipe) == before
    assert np.array_equal(draw(pipe, call), expected)
    session.detach()
    WAYS[way](pipe)
    assert np.array_equal(draw(pipe, call), expected)
    with pytest.raises(ConfigError, match="group offloading is enabled"):
        blockswap.attach(pipe, device="cpu", offload=2)


@pytest.mark.parametrize("way", ["denoiser", "function", "part"])
def test_group_offloading_of_a_model_that_streams_alone_is_refused(
    way: str, flux: tuple[Any, dict[str, Any]]
) -> None:
    pipe, call = flux
    expected = draw(pipe, call)
    with blockswap.attach(pipe.transformer, device="cpu", offload=2):
        with pytest.raises(ConfigError, match="moves the weights of FluxTransformer2DModel"):
            WAYS[way](pipe)
        pipe.vae.enable_group_offload(**HOW)  # theirs to place
        assert np.array_equal(draw(pipe, call), expected)
    WAYS[way](pipe)
    assert np.array_equal(draw(pipe, call), expected)
