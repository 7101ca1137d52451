"""LTX-Video."""

from __future__ import annotations

from typing import Any

from benchmarks.recipes.recipe import PROMPT, Recipe
from benchmarks.recipes.source import Source
from benchmarks.recipes.t5 import t5_encoder
from blockswap.demo.tokenizers import save_t5_tokenizer


def ltx(source: Source) -> Recipe:
    """LTX-Video 0.9: 1.9 billion parameters, and T5-XXL.

    T5 is more than twice the transformer, so 30 % of all weights would hold the transformer whole:
    the video is as long and as large as makes its activations leave no room for that.
    """
    from diffusers import (
        AutoencoderKLLTXVideo,
        FlowMatchEulerDiscreteScheduler,
        LTXPipeline,
        LTXVideoTransformer3DModel,
    )

    full = source.full
    text_encoder: Any = source.module(t5_encoder(full))
    small = {
        "num_attention_heads": 6,
        "attention_head_dim": 32,
        "cross_attention_dim": 192,
        "num_layers": 10,
        "caption_channels": text_encoder.config.d_model,
    }
    small_vae = {
        "block_out_channels": (16, 32, 32, 32),
        "decoder_block_out_channels": (16, 32, 32, 32),
        "layers_per_block": (1, 1, 1, 1, 1),
        "decoder_layers_per_block": (1, 1, 1, 1, 1),
    }
    pipe = LTXPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True,
            base_shift=0.95,
            max_shift=2.05,
            base_image_seq_len=1024,
            max_image_seq_len=4096,
            shift_terminal=0.1,
        ),
        # Without arguments: as published.
        vae=source.module(lambda: AutoencoderKLLTXVideo(**({} if full else small_vae))),
        text_encoder=text_encoder,
        tokenizer=save_t5_tokenizer(source.folder / "tokenizer", max_length=128),
        transformer=source.module(lambda: LTXVideoTransformer3DModel(**({} if full else small))),
    )
    pipe.vae.enable_tiling()
    pipe.vae.use_framewise_decoding = True
    call = {
        "prompt": PROMPT,
        "height": 704 if full else 128,
        "width": 1216 if full else 160,
        "num_frames": 201 if full else 17,
        "guidance_scale": 3.0,
        "max_sequence_length": 128 if full else 32,
        "num_inference_steps": 6 if full else 4,
    }
    return Recipe(pipe, call, tiling="the VAE decodes tiles of 512x512 and 16 frames")
