"""UNets: Stable Diffusion 1.5 and XL, their relatives for video, and other pyramids."""

from __future__ import annotations

from typing import Any

from tests.families.family import Draw, Inputs, family

SIDE, TEXT = 8, 6
_UNET = {
    "sample_size": SIDE,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (16, 32),
    "layers_per_block": 2,
    "norm_num_groups": 4,
    "cross_attention_dim": 24,
}
_SDXL = {
    "layers_per_block": 1,
    "transformer_layers_per_block": (1, 2),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 20 + 6 * 8,
}


def stages(suffix: str, first: str = "CrossAttn", prefix: str = "") -> dict[str, Any]:
    """Return two stages down and two up; the inner ones do not attend to the text."""
    return {
        "down_block_types": (f"{prefix}{first}DownBlock{suffix}", f"{prefix}DownBlock{suffix}"),
        "up_block_types": (f"{prefix}UpBlock{suffix}", f"{prefix}{first}UpBlock{suffix}"),
    }


def unet_inputs(draw: Draw, *frames: int) -> Inputs:
    """Return a latent image or video, a timestep and a text."""
    return {
        "sample": draw(1, 4, *frames, SIDE, SIDE),
        "timestep": draw.times(500.0),
        "encoder_hidden_states": draw(1, TEXT, 24),
    }


def sdxl_inputs(draw: Draw) -> Inputs:
    """Return the inputs of SDXL: a pooled text and sizes besides."""
    sizes = draw.floats(64.0, 64.0, 0.0, 0.0, 64.0, 64.0)[None]
    return unet_inputs(draw) | {
        "added_cond_kwargs": {"text_embeds": draw(1, 20), "time_ids": sizes}
    }


def motion_inputs(draw: Draw) -> Inputs:
    """Return a latent video and a text for each of its frames."""
    return unet_inputs(draw, 2) | {"encoder_hidden_states": draw(2, TEXT, 24)}


def i2vgen_inputs(draw: Draw) -> Inputs:
    """Return a latent video with the image that it starts from."""
    return unet_inputs(draw, 2) | {
        "fps": draw.ints(16),
        "image_latents": draw(1, 4, 2, SIDE, SIDE),
        "image_embeddings": draw(1, 24),
    }


def svd_inputs(draw: Draw) -> Inputs:
    """Return a latent video, frames before channels, an image and its ids."""
    return {
        "sample": draw(1, 2, 8, SIDE, SIDE),
        "timestep": draw.times(1.5),
        "encoder_hidden_states": draw(1, 1, 24),
        "added_time_ids": draw.floats(6.0, 127.0, 0.02)[None],
    }


def cascade_inputs(draw: Draw) -> Inputs:
    """Return a latent image with the texts and images of Stable Cascade's prior."""
    return {
        "sample": draw(1, 4, SIDE, SIDE),
        "timestep_ratio": draw.floats(0.5),
        "clip_text_pooled": draw(1, 1, 16),
        "clip_text": draw(1, TEXT, 24),
        "clip_img": draw(1, 1, 20),
    }


FAMILIES = (
    family(
        "sd1.5",
        "UNet2DConditionModel",
        _UNET | stages("2D") | {"attention_head_dim": 2},
        unet_inputs,
    ),
    family(
        "sdxl",
        "UNet2DConditionModel",
        _UNET
        | _SDXL
        | {
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": (2, 4),
        },
        sdxl_inputs,
    ),
    family(
        "unet-2d",
        "UNet2DModel",
        {
            "sample_size": SIDE,
            "in_channels": 4,
            "out_channels": 4,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            "block_out_channels": (16, 32),
            "norm_num_groups": 4,
        },
        lambda draw: {"sample": draw(1, 4, SIDE, SIDE), "timestep": draw.ints(500)},
    ),
    family(
        "unet-1d",
        "UNet1DModel",
        {
            "sample_size": 32,
            "in_channels": 4,
            "out_channels": 4,
            "extra_in_channels": 64,
            "block_out_channels": (32, 32, 64),
        },
        lambda draw: {"sample": draw(1, 4, 32), "timestep": draw.times(500.0)},
    ),
    family(
        "unet-3d",
        "UNet3DConditionModel",
        _UNET | stages("3D") | {"attention_head_dim": 8},
        lambda draw: unet_inputs(draw, 2),
    ),
    family(
        "i2vgen-xl",
        "I2VGenXLUNet",
        _UNET | stages("3D") | {"attention_head_dim": 8, "num_attention_heads": 2},
        i2vgen_inputs,
    ),
    family(
        "animatediff",
        "UNetMotionModel",
        _UNET | stages("Motion") | {"num_attention_heads": 2, "motion_num_attention_heads": 2},
        motion_inputs,
    ),
    family(
        "svd",
        "UNetSpatioTemporalConditionModel",
        {name: value for name, value in _UNET.items() if name != "norm_num_groups"}
        | stages("SpatioTemporal")
        | {
            "in_channels": 8,
            "block_out_channels": (32, 64),
            "layers_per_block": 1,
            "num_attention_heads": (2, 4),
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 24,
            "num_frames": 2,
        },
        svd_inputs,
    ),
    family(
        "dreamlite",
        "DreamLiteUNetModel",
        _UNET
        | {
            "down_block_types": (
                "DreamLiteCrossAttnNoSelfAttnDownBlock2D",
                "DreamLiteCrossAttnDownBlock2D",
            ),
            "up_block_types": ("DreamLiteCrossAttnUpBlock2D", "DreamLiteUpBlock2D"),
            "attention_head_dim": 8,
            "ff_mult": 2,
        },
        unet_inputs,
    ),
    family(
        "kandinsky3",
        "Kandinsky3UNet",
        {
            "in_channels": 4,
            "time_embedding_dim": 16,
            "groups": 4,
            "attention_head_dim": 8,
            "layers_per_block": 2,
            "block_out_channels": (16, 32),
            "cross_attention_dim": 16,
            "encoder_hid_dim": 24,
        },
        lambda draw: unet_inputs(draw) | {"encoder_attention_mask": draw.ones(1, TEXT)},
    ),
    family(
        "stable-cascade",
        "StableCascadeUNet",
        {
            "in_channels": 4,
            "out_channels": 4,
            "timestep_ratio_embedding_dim": 8,
            "conditioning_dim": 16,
            "block_out_channels": (16, 32),
            "num_attention_heads": (2, 2),
            "down_num_layers_per_block": (2, 2),
            "up_num_layers_per_block": (2, 2),
            "clip_text_in_channels": 24,
            "clip_text_pooled_in_channels": 16,
            "clip_image_in_channels": 20,
        },
        cascade_inputs,
    ),
)
