"""Image models: Qwen-Image, Z-Image and others of their time."""

from __future__ import annotations

from tests.families import inputs_image as inputs
from tests.families.family import family

_HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
_QWEN = _HEADS | {
    "num_layers": 3,
    "in_channels": 16,
    "axes_dims_rope": (4, 6, 6),
}
_JOY = {
    "in_channels": 4,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "text_dim": 24,
    "num_layers": 3,
    "rope_dim_list": [4, 6, 6],
}

FAMILIES = (
    family(
        "qwen-image",
        "QwenImageTransformer2DModel",
        _QWEN | {"out_channels": 4, "joint_attention_dim": 24},
        inputs.tokens_inputs,
    ),
    family(
        "qwen-image-2.1",
        "QwenImage21Transformer2DModel",
        _QWEN | {"out_channels": 16, "context_in_dim": 24},
        inputs.qwen21_inputs,
    ),
    family(
        "z-image",
        "ZImageTransformer2DModel",
        {
            "in_channels": 4,
            "dim": 64,  # wide: the embedding of the time takes 1 MiB at any size
            "n_layers": 4,
            "n_refiner_layers": 2,
            "n_heads": 4,
            "n_kv_heads": 4,
            "cap_feat_dim": 24,
            "axes_dims": [4, 6, 6],
            "axes_lens": [128, 16, 16],
        },
        inputs.z_image_inputs,
    ),
    family(
        "krea2",
        "Krea2Transformer2DModel",
        _HEADS
        | {
            "in_channels": 16,
            "num_layers": 4,
            "num_key_value_heads": 1,
            "intermediate_size": 64,
            "timestep_embed_dim": 16,
            "text_hidden_dim": 24,
            "num_text_layers": 3,
            "text_num_attention_heads": 2,
            "text_num_key_value_heads": 2,
            "text_intermediate_size": 32,
            "axes_dims_rope": (4, 6, 6),
        },
        inputs.krea_inputs,
    ),
    family(
        "ideogram4",
        "Ideogram4Transformer2DModel",
        _HEADS
        | {
            "in_channels": 16,
            "num_layers": 3,
            "intermediate_size": 64,
            "adaln_dim": 16,
            "llm_features_dim": 24,
            "mrope_section": (4, 2, 2),
        },
        inputs.ideogram_inputs,
    ),
    family(
        "ernie-image",
        "ErnieImageTransformer2DModel",
        {
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_layers": 3,
            "ffn_hidden_size": 64,
            "in_channels": 4,
            "out_channels": 4,
            "text_in_dim": 24,
            "rope_axes_dim": (4, 6, 6),
        },
        inputs.ernie_inputs,
    ),
    family(
        "nucleus-moe",
        "NucleusMoEImageTransformer2DModel",
        _QWEN
        | {
            "out_channels": 4,
            "num_layers": 4,
            "joint_attention_dim": 24,
            "dense_moe_strategy": "leave_first_block_dense",
            "num_experts": 4,
            "moe_intermediate_dim": 16,
            "capacity_factors": 2.0,
        },
        inputs.nucleus_inputs,
    ),
    family(
        "joy-image-edit",
        "JoyImageEditTransformer3DModel",
        _JOY,
        lambda draw: inputs.text_inputs(draw) | {"hidden_states": draw(1, 2, 4, 1, 4, 4)},
    ),
    family(
        "joy-image-edit-plus", "JoyImageEditPlusTransformer3DModel", _JOY, inputs.joy_plus_inputs
    ),
    family(
        "prx",
        "PRXTransformer2DModel",
        {
            "in_channels": 4,
            "context_in_dim": 24,
            "hidden_size": 32,
            "num_heads": 2,
            "depth": 3,
            "axes_dim": [8, 8],
        },
        lambda draw: inputs.text_inputs(draw, time=0.5),
    ),
)
