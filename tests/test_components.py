"""Which of a pipeline's components stream, and which come whole."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from pipelines import CPU, draw, make, make_sd3, noise
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    T5Config,
    T5EncoderModel,
)

import blockswap
from blockswap.bench import zoo
from blockswap.components import MOST_WHOLE_BYTES, Components
from blockswap.config import SwapConfig
from blockswap.demo.weights import random_module
from blockswap.errors import ConfigError


def encoder(num_layers: int) -> T5EncoderModel:
    """A T5-XXL encoder of so many layers, without memory."""
    with torch.device("meta"):
        config = T5Config(
            d_model=4096,
            d_ff=10240,
            d_kv=64,
            num_heads=64,
            num_layers=num_layers,
            feed_forward_proj="gated-gelu",
        )
        return T5EncoderModel(config).to(torch.bfloat16)


@pytest.mark.parametrize(("num_layers", "streams"), [(2, False), (6, True), (24, True)])
def test_an_encoder_of_more_than_two_gib_streams_and_a_smaller_one_comes_whole(
    num_layers: int, streams: bool
) -> None:
    parts: Any = {
        "transformer": zoo.build("flux", "tiny", torch.float32, "cpu", 0),
        "text_encoder_2": encoder(num_layers),
    }
    num_bytes = sum(p.nbytes for p in parts["text_encoder_2"].parameters())
    assert (num_bytes > MOST_WHOLE_BYTES) is streams
    found = Components.of(SimpleNamespace(components=parts), SwapConfig(device="cpu"))
    assert list(found.denoisers) == ["transformer"]
    assert list(found.visitors) == (["text_encoder_2"] if streams else [])
    assert [guest.name for guest in found.guests] == ([] if streams else ["text_encoder_2"])


def test_encoders_of_a_combined_pipeline_come_whole_although_they_are_named_as_its_prior(
    tmp_path: Path,
) -> None:
    sdxl, _ = make("sdxl", tmp_path)
    prior = diffusers.PriorTransformer(
        num_attention_heads=2,
        attention_head_dim=64,
        num_layers=4,
        embedding_dim=64,
        num_embeddings=7,
        additional_embeddings=4,
    )
    image_encoder = CLIPVisionModelWithProjection(
        CLIPVisionConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32)
    )
    pipe = diffusers.KandinskyV22CombinedPipeline(
        unet=sdxl.unet,
        scheduler=sdxl.scheduler,
        movq=diffusers.VQModel(),
        prior_prior=prior,
        prior_image_encoder=image_encoder,
        prior_text_encoder=sdxl.text_encoder,
        prior_tokenizer=sdxl.tokenizer,
        prior_scheduler=sdxl.scheduler,
        prior_image_processor=None,
    )
    with blockswap.attach(pipe, device="cpu", offload=3) as session:
        assert list(session.sessions) == ["unet", "prior_prior"]
        whole = {"movq", "prior_image_encoder", "prior_text_encoder"}
        assert session.report().guests.keys() == whole


def z_image() -> Any:
    """Return ZImageControlNetPipeline without its text encoder; both models have refiners."""
    same = {"dim": 128, "n_refiner_layers": 2, "n_heads": 4, "n_kv_heads": 4}
    transformer = random_module(
        lambda: diffusers.ZImageTransformer2DModel(
            in_channels=4,
            n_layers=4,
            cap_feat_dim=32,
            axes_dims=[8, 12, 12],
            axes_lens=[256, 64, 64],
            **same,
        ),
        torch.float32,
        CPU,
        0,
    )
    controlnet = random_module(
        lambda: diffusers.ZImageControlNetModel(
            [0, 2], [0, 1], 4, add_control_noise_refiner="control_noise_refiner", **same
        ),
        torch.float32,
        CPU,
        1,
    )
    sd3, _ = make_sd3()
    pipe = diffusers.ZImageControlNetPipeline(
        sd3.scheduler, sd3.vae, None, None, transformer, controlnet
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_module_of_two_denoisers_is_refused_until_one_has_its_own() -> None:
    pipe = z_image()
    assert pipe.controlnet.noise_refiner is pipe.transformer.noise_refiner
    call = {
        "prompt_embeds": [noise(8, 32)],
        "negative_prompt_embeds": [noise(8, 32)],
        "control_image": noise(1, 3, 64, 64).sigmoid(),
        "height": 64,
        "width": 64,
        "output_type": "latent",
    }
    expected = draw(pipe, call)
    before = [sorted(vars(module)) for module in pipe.transformer.modules()]
    shared = (
        r"pipe\.transformer\.t_embedder and pipe\.controlnet\.t_embedder are one module, .*"
        r"pipe\.controlnet = copy\.deepcopy\(pipe\.controlnet\)"
    )
    with pytest.raises(ConfigError, match=shared):
        blockswap.attach(pipe, device="cpu", offload="1GB")
    assert [sorted(vars(module)) for module in pipe.transformer.modules()] == before
    pipe.controlnet = copy.deepcopy(pipe.controlnet)
    with blockswap.attach(pipe, device="cpu", offload="1GB") as session:
        for _ in range(3):
            assert np.array_equal(draw(pipe, call), expected)
        assert session.state == "ready"


def test_denoiser_that_shares_a_module_is_refused_by_an_attached_pipeline(tmp_path: Path) -> None:
    pipe, call = make("wan", tmp_path)
    call |= {"height": 64, "width": 64, "output_type": "latent"}
    expected = draw(pipe, call)
    sharing = copy.deepcopy(pipe.transformer)
    sharing.blocks[0] = pipe.transformer.blocks[0]
    with blockswap.attach(pipe, device="cpu", offload="1GB") as session:
        with pytest.raises(ConfigError, match=r"pipe\.transformer_2\.blocks\.0 are one module"):
            pipe.transformer_2 = sharing
        assert pipe.transformer_2 is None
        assert list(session.sessions) == ["transformer"]
        assert np.array_equal(draw(pipe, call), expected)


def test_tied_weights_of_two_denoisers_stream(tmp_path: Path) -> None:
    pipe, call = make("wan", tmp_path)
    call |= {"height": 64, "width": 64, "output_type": "latent"}
    pipe.transformer_2 = copy.deepcopy(pipe.transformer)
    pipe.register_to_config(boundary_ratio=0.5)
    first, second = (model.blocks[0].ffn.net[2] for model in (pipe.transformer, pipe.transformer_2))
    second.weight = first.weight
    expected = draw(pipe, call, steps=6)
    with blockswap.attach(pipe, device="cpu", offload="1GB"):
        for _ in range(2):
            assert np.array_equal(draw(pipe, call, steps=6), expected)
