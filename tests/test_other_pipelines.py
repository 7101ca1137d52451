"""Pipelines whose denoisers have names that tell nothing stream them, and draw the same."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from other_pipelines import Parts, make_other, make_unet, noise, picture, versatile_parts
from PIL import Image
from pipelines import make_sd3
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

import blockswap
from blockswap.components import Components, denoisers_of
from blockswap.config import SwapConfig
from blockswap.errors import ConfigError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("kind", "streamed", "whole"),
    [
        ("cascade", ["decoder"], {"text_encoder", "vqgan"}),
        ("wuerstchen", ["decoder"], {"text_encoder", "vqgan"}),
        (
            "unclip",
            ["prior"],
            {"decoder", "super_res_first", "super_res_last", "text_encoder", "text_proj"},
        ),
        ("ideogram", ["transformer", "unconditional_transformer"], set()),
        ("versatile", ["image_unet"], {"text_encoder", "vae"}),
        ("animatediff", ["unet"], {"text_encoder", "vae"}),
        ("controlnet-xs", ["unet"], {"text_encoder", "vae"}),
    ],
)
def test_pipeline_draws_what_it_draws_unswapped(
    kind: str, streamed: list[str], whole: set[str], tmp_path: Path
) -> None:
    pipe, call = make_other(kind, tmp_path)
    expected = picture(pipe, call)
    before = {n: sorted(vars(p)) for n, p in pipe.components.items() if isinstance(p, nn.Module)}
    with blockswap.attach(pipe, device="cpu", offload="1GB", check=True) as session:
        assert list(session.sessions) == streamed
        for _ in range(4):
            assert np.array_equal(picture(pipe, call), expected)
        report = session.report()
        assert session.state == "ready"
        assert report.guests.keys() == whole
        for name, part in report.parts.items():
            weights = sum(p.nbytes for p in pipe.components[name].parameters())
            assert part.streamed_bytes > 0.8 * weights
    assert {name: sorted(vars(pipe.components[name])) for name in before} == before
    assert np.array_equal(picture(pipe, call), expected)


def versatile_diffusion(folder: Path) -> Any:
    """Return the pipeline that makes one of its three others for each call."""
    make = Parts(folder)
    config = CLIPVisionConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        projection_dim=64,
    )
    pipe = diffusers.VersatileDiffusionPipeline(
        image_encoder=make(lambda: CLIPVisionModelWithProjection(config)),
        image_feature_extractor=lambda **_: SimpleNamespace(pixel_values=noise(1, 3, 32, 32)),
        **versatile_parts(make),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_attention_that_another_component_lends_for_a_call_streams_with_the_denoiser(
    tmp_path: Path,
) -> None:
    def draw(pipe: Any) -> list[np.ndarray]:
        call = {"num_inference_steps": 3, "output_type": "np"}
        seeds = [torch.Generator().manual_seed(1) for _ in range(2)]
        image = Image.new("RGB", (32, 32))
        return [
            pipe.text_to_image("a red fox", generator=seeds[0], **call)[0],
            pipe.image_variation(image, generator=seeds[1], **call)[0],
        ]

    pipe = versatile_diffusion(tmp_path)
    expected = draw(pipe)
    assert not np.array_equal(*expected)
    with blockswap.attach(pipe, device="cpu", offload="1GB", check=True) as session:
        assert list(session.sessions) == ["image_unet"]
        for _ in range(3):
            for drawn, right in zip(draw(pipe), expected, strict=True):
                assert np.array_equal(drawn, right)
    for drawn, right in zip(draw(pipe), expected, strict=True):
        assert np.array_equal(drawn, right)


def test_decoder_of_a_vae_comes_whole_whatever_its_name(tmp_path: Path) -> None:
    make = Parts(tmp_path)
    sd3, _ = make_sd3()
    parts = {"image_unet": make_unet(make), "decoder": sd3.vae.decoder, "vae": sd3.vae}
    found = Components.of(SimpleNamespace(components=parts), SwapConfig(device="cpu"))
    assert list(found.denoisers) == ["image_unet"]
    assert [guest.name for guest in found.guests] == ["decoder", "vae"]


def test_network_that_was_found_by_its_class_streams_on_when_one_with_a_name_comes(
    tmp_path: Path,
) -> None:
    pipe, call = make_other("unclip", tmp_path)
    expected = picture(pipe, call)
    prior, pipe.prior = pipe.prior, None
    with blockswap.attach(pipe, device="cpu", offload="1GB") as session:
        before = dict(session.sessions)
        assert list(before) == ["decoder", "super_res_first", "super_res_last"]
        pipe.prior = prior
        assert list(session.sessions) == ["prior", *before]
        assert all(session.sessions[name] is before[name] for name in before)
        assert np.array_equal(picture(pipe, call), expected)
    assert np.array_equal(picture(pipe, call), expected)


def test_class_made_from_one_of_diffusers_is_found_and_one_without_blocks_comes_whole(
    tmp_path: Path,
) -> None:
    class Ours(diffusers.UNet2DConditionModel):
        pass

    class Plain(diffusers.UNet2DModel):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.net = nn.Linear(512, 512)

    ours = make_unet(Parts(tmp_path), Ours)
    plain = Plain()
    assert list(denoisers_of(SimpleNamespace(components={"first": plain, "second": ours}))) == [
        "second"
    ]
    alone: Any = SimpleNamespace(components={"first": plain})
    with pytest.raises(ConfigError, match=r"to stream \(pass one of its models itself: pipe.first"):
        blockswap.attach(alone, device="cpu")
