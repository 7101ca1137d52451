"""Image models: Stable Diffusion 3, DiT, CogView and others of their time."""

from __future__ import annotations

from tests.families import inputs_image as inputs
from tests.families.family import family

_HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
_PATCHES = _HEADS | {"sample_size": inputs.SIDE, "patch_size": 2, "in_channels": 4}
_SD3 = _PATCHES | {
    "num_layers": 4,
    "out_channels": 4,
    "joint_attention_dim": 24,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 20,
    "pos_embed_max_size": 8,
}
_COGVIEW = _HEADS | {
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "text_embed_dim": 24,
    "time_embed_dim": 16,
    "condition_dim": 8,
}


FAMILIES = (
    family("sd3", "SD3Transformer2DModel", _SD3, inputs.sd3_inputs),
    family(
        "sd3.5",
        "SD3Transformer2DModel",
        _SD3 | {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)},
        inputs.sd3_inputs,
    ),
    family(
        "auraflow",
        "AuraFlowTransformer2DModel",
        _PATCHES
        | {
            "num_mmdit_layers": 2,
            "num_single_dit_layers": 3,
            "joint_attention_dim": 24,
            "caption_projection_dim": 32,
            "pos_embed_max_size": 64,
        },
        lambda draw: inputs.text_inputs(draw, time=0.5),
    ),
    family(
        "dit",
        "DiTTransformer2DModel",
        _PATCHES | {"num_layers": 3, "num_embeds_ada_norm": 8, "out_channels": 8},
        lambda draw: {
            "hidden_states": draw(1, 4, 8, 8),
            "timestep": draw.ints(5),
            "class_labels": draw.ints(3),
        },
    ),
    family(
        "pixart",
        "PixArtTransformer2DModel",
        _PATCHES
        | {
            "num_layers": 3,
            "out_channels": 8,
            "cross_attention_dim": 32,
            "caption_channels": 24,
            "use_additional_conditions": False,
        },
        lambda draw: (
            inputs.text_inputs(draw)
            | {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
        ),
    ),
    family(
        "sana",
        "SanaTransformer2DModel",
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
        inputs.text_inputs,
    ),
    family(
        "hunyuan-dit",
        "HunyuanDiT2DModel",
        _PATCHES
        | {
            "hidden_size": 32,
            "num_layers": 4,
            "cross_attention_dim": 24,
            "cross_attention_dim_t5": 32,
            "pooled_projection_dim": 16,
            "text_len": 6,
            "text_len_t5": 6,
            "use_style_cond_and_image_meta_size": False,
        },
        inputs.hunyuan_dit_inputs,
    ),
    family(
        "lumina-next",
        "LuminaNextDiT2DModel",
        {
            "sample_size": 8,
            "in_channels": 4,
            "hidden_size": 32,
            "num_layers": 3,
            "num_attention_heads": 2,
            "num_kv_heads": 1,
            "multiple_of": 16,
            "cross_attention_dim": 24,
        },
        inputs.lumina_next_inputs,
    ),
    family(
        "lumina2",
        "Lumina2Transformer2DModel",
        {
            "sample_size": 8,
            "in_channels": 4,
            "hidden_size": 32,
            "num_layers": 3,
            "num_refiner_layers": 2,
            "num_attention_heads": 2,
            "num_kv_heads": 1,
            "multiple_of": 16,
            "axes_dim_rope": (4, 6, 6),
            "axes_lens": (32, 16, 16),
            "cap_feat_dim": 24,
        },
        lambda draw: (
            inputs.text_inputs(draw, time=0.5)
            | {"encoder_attention_mask": draw.true(1, inputs.TEXT)}
        ),
    ),
    family(
        "cogview3-plus",
        "CogView3PlusTransformer2DModel",
        _COGVIEW | {"pos_embed_max_size": 8, "sample_size": 8},
        inputs.sized_inputs,
    ),
    family("cogview4", "CogView4Transformer2DModel", _COGVIEW, inputs.sized_inputs),
    family(
        "glm-image",
        "GlmImageTransformer2DModel",
        _COGVIEW | {"prior_vq_quantizer_codebook_size": 32},
        inputs.glm_inputs,
    ),
    family(
        "hidream",
        "HiDreamImageTransformer2DModel",
        _HEADS
        | {
            "patch_size": 2,
            "in_channels": 4,
            "num_layers": 2,
            "num_single_layers": 2,
            "caption_channels": [24, 24],
            "text_emb_dim": 20,
            "axes_dims_rope": (4, 6, 6),
            "max_resolution": (8, 8),
            "llama_layers": [0, 1, 0, 1],
            "force_inference_output": True,
        },
        inputs.hidream_inputs,
    ),
    family(
        "omnigen",
        "OmniGenTransformer2DModel",
        {
            "in_channels": 4,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "intermediate_size": 64,
            "num_layers": 3,
            "pad_token_id": 0,
            "vocab_size": 32,
            "pos_embed_max_size": 8,
            "time_step_dim": 16,
            "rope_scaling": {"long_factor": [1.0] * 8, "short_factor": [1.0] * 8},
        },
        inputs.omnigen_inputs,
    ),
)
