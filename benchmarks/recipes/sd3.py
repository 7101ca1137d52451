"""Stable Diffusion 3.5."""

from __future__ import annotations

from typing import Any

from benchmarks.recipes.recipe import PROMPT, Recipe
from benchmarks.recipes.source import Source
from benchmarks.recipes.t5 import t5_encoder
from blockswap.demo.pipelines import clip_config, vae_config
from blockswap.demo.tokenizers import save_clip_tokenizer, save_t5_tokenizer


def sd35(source: Source) -> Recipe:
    """Stable Diffusion 3.5 Large: 8.1 billion parameters, two CLIP text encoders and T5-XXL."""
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from transformers import CLIPTextModelWithProjection

    full, folder = source.full, source.folder
    text, text_2 = clip_config(full, 768, 12), clip_config(full, 1280, 32)
    t5: Any = source.module(t5_encoder(full, width=128))
    transformer = source.module(
        lambda: SD3Transformer2DModel(
            sample_size=128 if full else 32,
            num_layers=38 if full else 12,
            attention_head_dim=64 if full else 16,
            num_attention_heads=38 if full else 8,
            joint_attention_dim=t5.config.d_model,
            caption_projection_dim=2432 if full else 128,
            pooled_projection_dim=text.projection_dim + text_2.projection_dim,
            pos_embed_max_size=192 if full else 32,
            qk_norm="rms_norm",
        )
    )
    vae = source.module(
        lambda: AutoencoderKL(
            **vae_config(full, 16),
            scaling_factor=1.5305,
            shift_factor=0.0609,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
    )
    pipe = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=source.module(lambda: CLIPTextModelWithProjection(text)),
        tokenizer=save_clip_tokenizer(folder / "tokenizer", text.vocab_size),
        text_encoder_2=source.module(lambda: CLIPTextModelWithProjection(text_2)),
        tokenizer_2=save_clip_tokenizer(folder / "tokenizer_2", text_2.vocab_size),
        text_encoder_3=t5,
        tokenizer_3=save_t5_tokenizer(folder / "tokenizer_3"),
    )
    pixels = 1024 if full else 128
    call = {
        "prompt": PROMPT,
        "height": pixels,
        "width": pixels,
        "guidance_scale": 3.5,
        "max_sequence_length": 256 if full else 32,
        "num_inference_steps": 8 if full else 4,
    }
    return Recipe(pipe, call)
