"""Tiny pipelines of real classes with random weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from blockswap.components import denoisers_of
from blockswap.demo.pipelines import demo_model
from blockswap.demo.weights import random_module

CPU = torch.device("cpu")


def denoiser_of(pipe: Any) -> Any:
    """Return the first of the models that run each step."""
    return next(iter(denoisers_of(pipe).values()))


def make_demo(family: str, folder: Path) -> tuple[Any, dict[str, Any]]:
    """Return the demo's tiny pipeline of that family and its call's arguments."""
    import diffusers

    model = demo_model(family, "tiny")
    seeds: Iterator[int] = iter(range(100))
    parts = model.components(
        False, lambda m: random_module(m, model.dtype, CPU, next(seeds)), folder
    )
    pipe = getattr(diffusers, model.pipeline)(**parts)
    return pipe, {"prompt": "a red fox"} | model.call


def make_sd3() -> tuple[Any, dict[str, Any]]:
    """Return StableDiffusion3Pipeline (3.5: with dual attention) without text encoders."""
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )

    transformer = random_module(
        lambda: SD3Transformer2DModel(
            sample_size=32,
            in_channels=4,
            out_channels=4,
            num_layers=4,
            attention_head_dim=16,
            num_attention_heads=8,
            caption_projection_dim=128,
            joint_attention_dim=32,
            pooled_projection_dim=64,
            pos_embed_max_size=32,
            dual_attention_layers=(0, 1),
            qk_norm="rms_norm",
        ),
        torch.float32,
        CPU,
        0,
    )
    vae = random_module(
        lambda: AutoencoderKL(
            block_out_channels=(32, 64),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            shift_factor=0.06,
            scaling_factor=1.5,
        ),
        torch.float32,
        CPU,
        1,
    )
    pipe = StableDiffusion3Pipeline(
        transformer, FlowMatchEulerDiscreteScheduler(), vae, *[None] * 6
    )
    call = {
        "prompt_embeds": noise(1, 8, 32),
        "negative_prompt_embeds": noise(1, 8, 32),
        "pooled_prompt_embeds": noise(1, 64),
        "negative_pooled_prompt_embeds": noise(1, 64),
        "height": 64,
        "width": 64,
    }
    return pipe, call


def make_qwen() -> tuple[Any, dict[str, Any]]:
    """Return QwenImagePipeline without its text encoder."""
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )

    transformer = random_module(
        lambda: QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=4,
            attention_head_dim=32,
            num_attention_heads=4,
            joint_attention_dim=32,
            axes_dims_rope=(8, 12, 12),
        ),
        torch.float32,
        CPU,
        0,
    )
    vae = random_module(
        lambda: AutoencoderKLQwenImage(
            base_dim=16,
            z_dim=4,
            dim_mult=[1, 2, 4],
            num_res_blocks=1,
            temperal_downsample=[False, True],
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        ),
        torch.float32,
        CPU,
        1,
    )
    pipe = QwenImagePipeline(FlowMatchEulerDiscreteScheduler(), vae, None, None, transformer)
    mask = torch.ones(1, 8, dtype=torch.long)
    call = {
        "prompt_embeds": noise(1, 8, 32),
        "prompt_embeds_mask": mask,
        "negative_prompt_embeds": noise(1, 8, 32),
        "negative_prompt_embeds_mask": mask,
        "height": 64,
        "width": 64,
    }
    return pipe, call


def make_nucleus() -> tuple[Any, dict[str, Any]]:
    """Return NucleusMoEImagePipeline without its text encoder; one block has experts."""
    from diffusers import NucleusMoEImagePipeline, NucleusMoEImageTransformer2DModel

    qwen, call = make_qwen()
    transformer = random_module(
        lambda: NucleusMoEImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=5,
            attention_head_dim=32,
            num_attention_heads=4,
            num_key_value_heads=2,
            joint_attention_dim=32,
            axes_dims_rope=(8, 12, 12),
            num_experts=4,
            moe_intermediate_dim=64,
            capacity_factors=2.0,
        ),
        torch.float32,
        CPU,
        0,
    )
    return NucleusMoEImagePipeline(transformer, qwen.scheduler, qwen.vae, None, None), call


def make(kind: str, folder: Path) -> tuple[Any, dict[str, Any]]:
    """Return a silent pipeline of that kind and its call's arguments."""
    makers = {"sd3": make_sd3, "qwen": make_qwen, "nucleus": make_nucleus}
    pipe, call = makers[kind]() if kind in makers else make_demo(kind, folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe, call


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


def draw(pipe: Any, call: dict[str, Any], steps: int = 4, **options: Any) -> np.ndarray:
    """Return what the pipeline draws; the same seed each time."""
    given = {"num_inference_steps": steps, "output_type": "np"} | call | options
    drawn = pipe(generator=torch.Generator().manual_seed(1), **given)[0]
    return np.asarray(drawn.cpu() if isinstance(drawn, torch.Tensor) else drawn)


def with_large_encoder(pipe: Any, blocks: int = 12) -> None:
    """Give a FLUX pipeline a T5 encoder with blocks of some 2 MiB each."""
    from transformers import T5Config, T5EncoderModel

    width = pipe.text_encoder_2.config.d_model
    config = T5Config(
        d_model=width,
        d_ff=2048,
        num_layers=blocks,
        num_heads=4,
        d_kv=128,
        vocab_size=pipe.text_encoder_2.config.vocab_size,
        feed_forward_proj="gated-gelu",
    )
    dtype = pipe.text_encoder_2.dtype
    pipe.text_encoder_2 = random_module(lambda: T5EncoderModel(config), dtype, CPU, 7)
