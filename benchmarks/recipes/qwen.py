"""Qwen-Image."""

from __future__ import annotations

from benchmarks.recipes.recipe import PROMPT, Recipe
from benchmarks.recipes.source import Source, num_words, word_tokenizer


def qwen(source: Source) -> Recipe:
    """Qwen-Image: 20.4 billion parameters, and Qwen2.5-VL 7B as text encoder."""
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    full = source.full
    text = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 152064 if full else 512,
            "hidden_size": 3584 if full else 128,
            "intermediate_size": 18944 if full else 1024,
            "num_hidden_layers": 28 if full else 9,
            "num_attention_heads": 28 if full else 8,
            "num_key_value_heads": 4 if full else 2,
            "max_position_embeddings": 128000,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1000000.0,
                "mrope_section": [16, 24, 24] if full else [2, 3, 3],
            },
            "use_cache": False,
        },
        vision_config={
            "depth": 32 if full else 1,
            "hidden_size": 1280 if full else 32,
            "intermediate_size": 3420 if full else 64,
            "num_heads": 16 if full else 2,
            "out_hidden_size": 3584 if full else 128,
        },
    )
    small = {
        "num_layers": 8,
        "attention_head_dim": 32,
        "num_attention_heads": 6,
        "joint_attention_dim": text.text_config.hidden_size,
        "axes_dims_rope": (8, 12, 12),
    }
    pipe = QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True,
            base_shift=0.5,
            max_shift=0.9,
            max_image_seq_len=8192,
            shift_terminal=0.02,
        ),
        # Without arguments: as published.
        vae=source.module(
            lambda: AutoencoderKLQwenImage(
                base_dim=96 if full else 8, num_res_blocks=2 if full else 1
            )
        ),
        text_encoder=source.module(lambda: Qwen2_5_VLForConditionalGeneration(text)),
        tokenizer=None,
        transformer=source.module(lambda: QwenImageTransformer2DModel(**({} if full else small))),
    )
    template = pipe.prompt_template_encode
    pipe.tokenizer = word_tokenizer(template + PROMPT, text.text_config.vocab_size)
    pipe.prompt_template_encode_start_idx = num_words(template[: template.index("{}")])
    pixels = 1024 if full else 128
    call = {
        "prompt": PROMPT,
        "negative_prompt": " ",
        "true_cfg_scale": 4.0,
        "height": pixels,
        "width": pixels,
        "num_inference_steps": 6 if full else 4,
    }
    return Recipe(pipe, call, note="Qwen's tokenizer is one of words" if full else "")
