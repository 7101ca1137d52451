"""Wan 2.2."""

from __future__ import annotations

from typing import Any

from benchmarks.recipes.recipe import PROMPT, Recipe
from benchmarks.recipes.source import Source
from benchmarks.recipes.t5 import umt5_encoder
from blockswap.demo.tokenizers import save_t5_tokenizer


def wan22(source: Source) -> Recipe:
    """Wan 2.2 T2V A14B: two experts of 14.3 billion parameters each, and UMT5-XXL."""
    from diffusers import (
        AutoencoderKLWan,
        UniPCMultistepScheduler,
        WanPipeline,
        WanTransformer3DModel,
    )

    full = source.full
    text_encoder: Any = source.module(umt5_encoder(full))

    def expert() -> WanTransformer3DModel:
        return WanTransformer3DModel(
            num_attention_heads=40 if full else 6,
            attention_head_dim=128 if full else 32,
            text_dim=text_encoder.config.d_model,
            freq_dim=256 if full else 64,
            ffn_dim=13824 if full else 512,
            num_layers=40 if full else 4,
        )

    pipe = WanPipeline(
        tokenizer=save_t5_tokenizer(source.folder / "tokenizer"),
        text_encoder=text_encoder,
        transformer=source.module(expert),
        transformer_2=source.module(expert),
        vae=source.module(
            lambda: AutoencoderKLWan(base_dim=96 if full else 8, num_res_blocks=2 if full else 1)
        ),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        boundary_ratio=0.875,
    )
    pipe.vae.enable_tiling()
    call = {
        "prompt": PROMPT,
        "height": 480 if full else 64,
        "width": 832 if full else 96,
        "num_frames": 33 if full else 5,
        "guidance_scale": 4.0,
        "guidance_scale_2": 3.0,
        "max_sequence_length": 512 if full else 64,
        "num_inference_steps": 5 if full else 4,
    }
    return Recipe(
        pipe,
        call,
        tiling="the VAE decodes tiles of 256x256",
        note="33 frames instead of 81" if full else "",
    )
