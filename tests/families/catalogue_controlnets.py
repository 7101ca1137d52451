"""ControlNets: half a denoiser each, with the blocks of its family."""

from __future__ import annotations

from typing import Any

from tests.families import catalogue_unets as unets
from tests.families import inputs_image as images
from tests.families.catalogue_flux import pooled_flux_inputs
from tests.families.family import Draw, Inputs, family

_HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
_UNET = {
    "in_channels": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "block_out_channels": (16, 32),
    "layers_per_block": 2,
    "norm_num_groups": 4,
    "cross_attention_dim": 24,
    "attention_head_dim": 2,
    "conditioning_embedding_out_channels": (8, 16),
}


def image_for(inputs: Inputs, draw: Draw, *shape: int, **more: Any) -> Inputs:
    """Return the inputs of the denoiser, and an image of this shape that steers it."""
    return inputs | {"controlnet_cond": draw(*shape)} | more


FAMILIES = (
    family(
        "controlnet-sd1.5",
        "ControlNetModel",
        _UNET,
        lambda draw: image_for(unets.unet_inputs(draw), draw, 1, 3, 16, 16),
    ),
    family(
        "controlnet-sdxl",
        "ControlNetModel",
        _UNET
        | {
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "transformer_layers_per_block": (1, 2),
            "attention_head_dim": (2, 4),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 20 + 6 * 8,
        },
        lambda draw: image_for(unets.sdxl_inputs(draw), draw, 1, 3, 16, 16),
    ),
    family(
        "controlnet-union",
        "ControlNetUnionModel",
        _UNET
        | {
            "num_control_type": 2,
            "num_trans_channel": 16,
            "num_trans_head": 2,
            "num_proj_channel": 16,
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 16,
        },
        lambda draw: (
            unets.unet_inputs(draw)
            | {
                "controlnet_cond": [draw(1, 3, 16, 16)],
                "control_type": draw.floats(0.0, 1.0)[None],
                "control_type_idx": [1],
            }
        ),
    ),
    family(
        "controlnet-xs",
        "UNetControlNetXSModel",
        {
            "sample_size": 8,
            "block_out_channels": (16, 32),
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "norm_num_groups": 4,
            "cross_attention_dim": 24,
            "num_attention_heads": 2,
            "upcast_attention": False,
            "ctrl_conditioning_embedding_out_channels": (8, 16),
            "ctrl_block_out_channels": (8, 16),
            "ctrl_num_attention_heads": 2,
            "ctrl_max_norm_num_groups": 4,
        },
        lambda draw: image_for(unets.unet_inputs(draw), draw, 1, 3, 16, 16),
    ),
    family(
        "controlnet-sparse",
        "SparseControlNetModel",
        _UNET
        | {
            "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
            "motion_num_attention_heads": 2,
        },
        lambda draw: image_for(
            unets.motion_inputs(draw),
            draw,
            *(1, 4, 2, 8, 8),
            conditioning_mask=draw.ones(1, 1, 2, 8, 8),
        ),
    ),
    family(
        "controlnet-flux",
        "FluxControlNetModel",
        _HEADS
        | {
            "in_channels": 16,
            "num_layers": 2,
            "num_single_layers": 3,
            "joint_attention_dim": 24,
            "pooled_projection_dim": 20,
            "guidance_embeds": True,
            "axes_dims_rope": [4, 6, 6],
            "num_mode": 2,
        },
        lambda draw: image_for(
            pooled_flux_inputs(draw), draw, 1, 16, 16, controlnet_mode=draw.ints(1)[None]
        ),
    ),
    family(
        "controlnet-sd3",
        "SD3ControlNetModel",
        _HEADS
        | {
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 4,
            "joint_attention_dim": 24,
            "caption_projection_dim": 32,
            "pooled_projection_dim": 20,
            "pos_embed_max_size": 8,
        },
        lambda draw: image_for(images.sd3_inputs(draw), draw, 1, 4, 8, 8),
    ),
    family(
        "controlnet-hunyuan-dit",
        "HunyuanDiT2DControlNetModel",
        _HEADS
        | {
            "in_channels": 4,
            "patch_size": 2,
            "sample_size": 8,
            "hidden_size": 32,
            "transformer_num_layers": 10,
            "cross_attention_dim": 24,
            "cross_attention_dim_t5": 32,
            "pooled_projection_dim": 16,
            "text_len": 6,
            "text_len_t5": 6,
            "use_style_cond_and_image_meta_size": False,
        },
        lambda draw: image_for(images.hunyuan_dit_inputs(draw), draw, 1, 4, 8, 8),
    ),
    family(
        "controlnet-qwen-image",
        "QwenImageControlNetModel",
        _HEADS
        | {
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 3,
            "joint_attention_dim": 24,
            "axes_dims_rope": (4, 6, 6),
        },
        lambda draw: image_for(images.tokens_inputs(draw), draw, 1, 16, 16),
    ),
    family(
        "controlnet-sana",
        "SanaControlNetModel",
        _HEADS
        | {
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 3,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 16,
            "cross_attention_dim": 32,
            "caption_channels": 24,
            "sample_size": 8,
        },
        lambda draw: image_for(images.text_inputs(draw), draw, 1, 4, 8, 8),
    ),
)
