"""HunyuanVideo, its successors and HunyuanImage."""

from __future__ import annotations

from tests.families import inputs_video as inputs
from tests.families.family import family

_HUNYUAN = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 2,
    "num_refiner_layers": 2,
    "text_embed_dim": 24,
    "rope_axes_dim": (4, 6, 6),
}
_SINGLE = {"num_single_layers": 3}

FAMILIES = (
    family(
        "hunyuan-video",
        "HunyuanVideoTransformer3DModel",
        _HUNYUAN | _SINGLE | {"pooled_projection_dim": 20},
        inputs.pooled_inputs,
    ),
    family(
        "hunyuan-video-i2v",
        "HunyuanVideoTransformer3DModel",
        _HUNYUAN | _SINGLE | {"pooled_projection_dim": 20, "image_condition_type": "token_replace"},
        inputs.pooled_inputs,
    ),
    family(
        "hunyuan-video-1.5",
        "HunyuanVideo15Transformer3DModel",
        _HUNYUAN
        # The second text goes through a layer of 16 MiB, whatever the width: blocks must hold more.
        | {
            "num_layers": 9,
            "num_attention_heads": 8,
            "text_embed_2_dim": 20,
            "image_embed_dim": 16,
        },
        inputs.hunyuan15_inputs,
    ),
    family(
        "hunyuan-framepack",
        "HunyuanVideoFramepackTransformer3DModel",
        _HUNYUAN
        | _SINGLE
        | {
            "pooled_projection_dim": 20,
            "has_image_proj": True,
            "image_proj_dim": 16,
            "has_clean_x_embedder": True,
        },
        inputs.framepack_inputs,
    ),
    family(
        "hunyuan-image",
        "HunyuanImageTransformer2DModel",
        _HUNYUAN | _SINGLE | {"rope_axes_dim": (8, 8), "guidance_embeds": True},
        inputs.hunyuan_image_inputs,
    ),
)
