"""Configurations of the model zoo: four published models, and toy models of the same classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

Kind = Literal["flux", "sdxl", "wan", "qwen"]
Size = Literal["full", "tiny"]
Config = dict[str, Any]

KINDS: tuple[Kind, ...] = ("flux", "sdxl", "wan", "qwen")
CLASSES = {
    "flux": "FluxTransformer2DModel",
    "sdxl": "UNet2DConditionModel",
    "wan": "WanTransformer3DModel",
    "qwen": "QwenImageTransformer2DModel",
}


def flux_config() -> Config:
    """FLUX.1-dev: 11.9 billion parameters, 19 + 38 blocks."""
    return {
        "in_channels": 64,
        "num_layers": 19,
        "num_single_layers": 38,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "guidance_embeds": True,
        "axes_dims_rope": (16, 56, 56),
    }


def sdxl_config() -> Config:
    """SDXL base UNet: 2.57 billion parameters, 70 transformer and 17 residual blocks."""
    return {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 2048,
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
        "use_linear_projection": True,
    }


def wan_config() -> Config:
    """Wan2.1-T2V-14B: 14.3 billion parameters, 40 blocks, 3 fp32 tensors in each."""
    return {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 40,
        "attention_head_dim": 128,
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": 4096,
        "freq_dim": 256,
        "ffn_dim": 13824,
        "num_layers": 40,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 1024,
    }


def qwen_config() -> Config:
    """Qwen-Image: 20.4 billion parameters, 60 blocks."""
    return {
        "patch_size": 2,
        "in_channels": 64,
        "out_channels": 16,
        "num_layers": 60,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 3584,
        "axes_dims_rope": (16, 56, 56),
    }


def tiny_flux_config() -> Config:
    """FLUX with 2 + 3 blocks of width 64."""
    return flux_config() | {
        "num_layers": 2,
        "num_single_layers": 3,
        "attention_head_dim": 16,
        "num_attention_heads": 4,
        "joint_attention_dim": 48,
        "pooled_projection_dim": 32,
        "axes_dims_rope": (4, 6, 6),
    }


def tiny_sdxl_config() -> Config:
    """SDXL UNet with two stages: 8 transformer and 8 residual blocks."""
    return sdxl_config() | {
        "sample_size": 16,
        "block_out_channels": (32, 64),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 48,
        "transformer_layers_per_block": (1, 2),
        "attention_head_dim": (2, 4),
        "norm_num_groups": 8,  # with one channel a group, norms would cancel the biases before
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 32 + 6 * 8,
        "layers_per_block": 1,
    }


def tiny_wan_config() -> Config:
    """Wan with 3 blocks of width 48."""
    return wan_config() | {
        "num_attention_heads": 4,
        "attention_head_dim": 12,
        "text_dim": 32,
        "ffn_dim": 96,
        "num_layers": 3,
        "rope_max_seq_len": 32,
    }


def tiny_qwen_config() -> Config:
    """Qwen-Image with 3 blocks of width 64."""
    return qwen_config() | {
        "num_layers": 3,
        "attention_head_dim": 16,
        "num_attention_heads": 4,
        "joint_attention_dim": 48,
        "axes_dims_rope": (4, 6, 6),
    }


CONFIGS: dict[tuple[str, str], Callable[[], Config]] = {
    ("flux", "full"): flux_config,
    ("sdxl", "full"): sdxl_config,
    ("wan", "full"): wan_config,
    ("qwen", "full"): qwen_config,
    ("flux", "tiny"): tiny_flux_config,
    ("sdxl", "tiny"): tiny_sdxl_config,
    ("wan", "tiny"): tiny_wan_config,
    ("qwen", "tiny"): tiny_qwen_config,
}
