"""Wan 2.1, Wan 2.2 and the video models that grew from it."""

from __future__ import annotations

from typing import Any

import torch

from tests.families.family import Draw, Inputs, family

FRAMES, SIDE, TEXT = 2, 4, 6
_WAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 24,
    "freq_dim": 16,
    "ffn_dim": 48,
    "num_layers": 3,
    "rope_max_seq_len": 32,
}
_IMAGE = {"image_dim": 20, "added_kv_proj_dim": 24}


def wan_inputs(draw: Draw, channels: int = 4, **more: Any) -> Inputs:
    """Return a latent video and a text."""
    return {
        "hidden_states": draw(1, channels, FRAMES, SIDE, SIDE),
        "timestep": draw.ints(500),
        "encoder_hidden_states": draw(1, TEXT, 24),
        **more,
    }


def image_inputs(draw: Draw) -> Inputs:
    """Return a latent video, a text and the features of the first image."""
    return wan_inputs(draw, encoder_hidden_states_image=draw(1, 5, 20))


def two_times_inputs(draw: Draw) -> Inputs:
    """Return the inputs of Wan 2.2 TI2V: each token has its own timestep."""
    return wan_inputs(draw) | {"timestep": draw.ints(*[0] * 4, *[500] * 4)[None]}


def vace_inputs(draw: Draw) -> Inputs:
    """Return a latent video, a text and a control video with a scale for each of its layers."""
    control = draw(1, 8, FRAMES, SIDE, SIDE)
    return wan_inputs(
        draw,
        control_hidden_states=control,
        control_hidden_states_scale=draw.floats(1.0, 0.5),
    )


def animate_inputs(draw: Draw) -> Inputs:
    """Return a latent video, its pose and the face that drives it."""
    return image_inputs(draw) | {
        "hidden_states": draw(1, 12, 3, SIDE, SIDE),
        "pose_hidden_states": draw(1, 4, 2, SIDE, SIDE),
        "face_pixel_values": draw(1, 3, 5, 16, 16),
    }


def animate2_inputs(draw: Draw) -> Inputs:
    """Return a reference to extract; the cache that is filled is a part of the output."""
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

    return {
        "hidden_states": [draw(4, FRAMES, SIDE, SIDE)],
        "condition_latents": [draw(4, FRAMES, SIDE, SIDE)],
        "timestep": draw.floats(500.0),
        "encoder_hidden_states": [draw(TEXT, 24)],
        "kv_cache": WanAnimate2KVCache(3),
        "kv_cache_mode": "extract",
        "seq_len": FRAMES * SIDE * SIDE // 4,
        "offset_grid_sizes": draw.ints(FRAMES, SIDE // 2, SIDE // 2)[None],
    }


def anyflow_inputs(draw: Draw) -> Inputs:
    """Return a latent video with two times, frames before channels."""
    return {
        "hidden_states": draw(1, FRAMES, 4, SIDE, SIDE),
        "timestep": draw.times(500.0, 500.0)[None],
        "r_timestep": draw.times(100.0, 100.0)[None],
        "encoder_hidden_states": draw(1, TEXT, 24),
    }


def helios_inputs(draw: Draw) -> Inputs:
    """Return a latent video and its history at three lengths."""

    def frames(first: int, count: int) -> torch.Tensor:
        return torch.arange(first, first + count, device=draw.device)[None]

    return wan_inputs(draw) | {
        "hidden_states": draw(1, 2, FRAMES, 8, 8),
        "indices_hidden_states": frames(8, FRAMES),
        "indices_latents_history_short": frames(6, 2),
        "indices_latents_history_mid": frames(4, 2),
        "indices_latents_history_long": frames(0, 4),
        "latents_history_short": draw(1, 2, 2, 8, 8),
        "latents_history_mid": draw(1, 2, 2, 8, 8),
        "latents_history_long": draw(1, 2, 4, 8, 8),
    }


def without(config: dict[str, Any], *names: str) -> dict[str, Any]:
    """Return a configuration without options that a class does not have."""
    return {name: value for name, value in config.items() if name not in names}


FAMILIES = (
    family("wan2.1-t2v", "WanTransformer3DModel", _WAN, wan_inputs),
    family("wan2.1-i2v", "WanTransformer3DModel", _WAN | _IMAGE, image_inputs),
    family("wan2.2-ti2v", "WanTransformer3DModel", _WAN, two_times_inputs),
    family(
        "wan-vace",
        "WanVACETransformer3DModel",
        _WAN | {"vace_layers": [0, 2], "vace_in_channels": 8},
        vace_inputs,
    ),
    family(
        "wan-animate",
        "WanAnimateTransformer3DModel",
        _WAN
        | _IMAGE
        | {
            "in_channels": 12,
            "latent_channels": 4,
            "num_layers": 4,
            "motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 8},
            "motion_encoder_size": 16,
            "motion_style_dim": 8,
            "motion_dim": 4,
            "motion_encoder_dim": 8,
            "face_encoder_hidden_dim": 8,
            "face_encoder_num_heads": 2,
            "inject_face_latents_blocks": 2,
        },
        animate_inputs,
    ),
    family(
        "wan-animate2",
        "WanAnimate2Transformer3DModel",
        {
            "text_len": TEXT,
            "in_dim": 8,
            "dim": 24,
            "ffn_dim": 48,
            "freq_dim": 16,
            "text_dim": 24,
            "out_dim": 4,
            "num_heads": 2,
            "num_layers": 3,
            "use_img_emb": False,
        },
        animate2_inputs,
    ),
    family("chronoedit", "ChronoEditTransformer3DModel", _WAN | _IMAGE, image_inputs),
    family("skyreels-v2", "SkyReelsV2Transformer3DModel", _WAN, wan_inputs),
    family("anyflow", "AnyFlowTransformer3DModel", _WAN, anyflow_inputs),
    family(
        "anyflow-far",
        "AnyFlowFARTransformer3DModel",
        _WAN | {"chunk_partition": (1, 1), "full_chunk_limit": 1},
        lambda draw: anyflow_inputs(draw) | {"chunk_partition": [1, 1]},
    ),
    family(
        "helios",
        "HeliosTransformer3DModel",
        without(_WAN, "rope_max_seq_len")
        | {"in_channels": 2, "out_channels": 2, "num_layers": 4, "rope_dim": (4, 4, 4)},
        helios_inputs,
    ),
)
