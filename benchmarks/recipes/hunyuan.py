"""HunyuanVideo."""

from __future__ import annotations

from benchmarks.recipes.recipe import PROMPT, Recipe
from benchmarks.recipes.source import Source, num_words, word_tokenizer
from blockswap.demo.pipelines import clip_config
from blockswap.demo.tokenizers import save_clip_tokenizer


def hunyuanvideo(source: Source) -> Recipe:
    """HunyuanVideo: 12.8 billion parameters, Llama 3 8B and CLIP as text encoders."""
    from diffusers import (
        AutoencoderKLHunyuanVideo,
        FlowMatchEulerDiscreteScheduler,
        HunyuanVideoPipeline,
        HunyuanVideoTransformer3DModel,
    )
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
    from transformers import CLIPTextModel, LlamaConfig, LlamaModel

    full = source.full
    template = str(DEFAULT_PROMPT_TEMPLATE["template"])
    text_2 = clip_config(full, 768, 12)
    text = LlamaConfig(
        vocab_size=128320 if full else 512,
        hidden_size=4096 if full else 128,
        intermediate_size=14336 if full else 1024,
        num_hidden_layers=32 if full else 4,
        num_attention_heads=32 if full else 4,
        num_key_value_heads=8 if full else 2,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        rms_norm_eps=1e-5,
        use_cache=False,
        pad_token_id=0,
    )
    small = {
        "num_attention_heads": 6,
        "attention_head_dim": 32,
        "num_layers": 3,
        "num_single_layers": 8,
        "num_refiner_layers": 1,
        "text_embed_dim": text.hidden_size,
        "pooled_projection_dim": text_2.hidden_size,
        "rope_axes_dim": (8, 12, 12),
    }
    small_vae = {"block_out_channels": (16, 16, 32, 32), "norm_num_groups": 8}
    pipe = HunyuanVideoPipeline(
        text_encoder=source.module(lambda: LlamaModel(text)),
        tokenizer=word_tokenizer(template + PROMPT, text.vocab_size),
        # Without arguments: as published.
        transformer=source.module(
            lambda: HunyuanVideoTransformer3DModel(**({} if full else small))
        ),
        vae=source.module(
            lambda: AutoencoderKLHunyuanVideo(
                **({} if full else small_vae), layers_per_block=2 if full else 1
            )
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=source.module(lambda: CLIPTextModel(text_2)),
        tokenizer_2=save_clip_tokenizer(source.folder / "tokenizer_2", text_2.vocab_size),
    )
    pipe.vae.enable_tiling()
    call = {
        "prompt": PROMPT,
        "prompt_template": {
            "template": template,
            "crop_start": num_words(template[: template.index("{}")]),
        },
        "height": 480 if full else 64,
        "width": 832 if full else 96,
        "num_frames": 33 if full else 5,
        "guidance_scale": 6.0,
        "max_sequence_length": 256 if full else 32,
        "num_inference_steps": 6 if full else 4,
    }
    return Recipe(
        pipe,
        call,
        tiling="the VAE decodes tiles of 256x256 and 16 frames",
        note="33 frames instead of 129; Llama's tokenizer is one of words" if full else "",
    )
