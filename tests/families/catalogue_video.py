"""Video models: CogVideoX, LTX, Cosmos, Kandinsky and others."""

from __future__ import annotations

from tests.families import inputs_video as inputs
from tests.families.family import family

_HEADS = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 3}
_LATENTS = _HEADS | {"in_channels": 4, "out_channels": 4}
_COGVIDEOX = _LATENTS | {
    "time_embed_dim": 16,
    "text_embed_dim": 24,
    "sample_width": 4,
    "sample_height": 4,
    "sample_frames": 5,
    "max_text_seq_length": 6,
}
_SANA = _LATENTS | {
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 16,
    "cross_attention_dim": 32,
    "caption_channels": 24,
}
_LTX = _HEADS | {
    "in_channels": 8,
    "out_channels": 8,
    "cross_attention_dim": 32,
    "caption_channels": 24,
}
_LTX2 = _LTX | {
    "audio_in_channels": 8,
    "audio_out_channels": 8,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 8,
    "audio_cross_attention_dim": 16,
}
_KANDINSKY = {
    "in_visual_dim": 4,
    "out_visual_dim": 4,
    "time_dim": 16,
    "model_dim": 32,
    "ff_dim": 64,
    "num_visual_blocks": 3,
    "axes_dims": (4, 6, 6),
}
_TEXT = {"in_text_dim": 24, "in_text_dim2": 20, "num_text_blocks": 2}

FAMILIES = (
    family("cogvideox", "CogVideoXTransformer3DModel", _COGVIDEOX, inputs.cogvideox_inputs),
    family(
        "consisid",
        "ConsisIDTransformer3DModel",
        _COGVIDEOX
        | {
            "num_attention_heads": 3,
            "num_layers": 4,
            "is_train_face": True,
            "cross_attn_dim_head": 8,
            "cross_attn_num_heads": 2,
            "LFE_id_dim": 8,
            "LFE_vit_dim": 8,
            "LFE_depth": 2,
            "LFE_dim_head": 4,
            "LFE_num_heads": 2,
            "LFE_num_id_token": 2,
            "LFE_num_querie": 3,
            "LFE_output_dim": 32,
            "LFE_ff_mult": 1,
            "LFE_num_scale": 2,
        },
        inputs.consisid_inputs,
    ),
    family(
        "allegro",
        "AllegroTransformer3DModel",
        _LATENTS
        | {
            "cross_attention_dim": 32,
            "sample_height": 4,
            "sample_width": 4,
            "sample_frames": 2,
            "caption_channels": 24,
        },
        inputs.allegro_inputs,
    ),
    family(
        "latte",
        "LatteTransformer3DModel",
        _LATENTS
        | {
            "cross_attention_dim": 32,
            "attention_bias": True,
            "sample_size": 4,
            "patch_size": 2,
            "activation_fn": "gelu-approximate",
            "num_embeds_ada_norm": 8,
            "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False,
            "caption_channels": 24,
            "video_length": 2,
        },
        inputs.video_inputs,
    ),
    family(
        "mochi",
        "MochiTransformer3DModel",
        _HEADS
        | {
            "in_channels": 4,
            "pooled_projection_dim": 16,
            "text_embed_dim": 24,
            "time_embed_dim": 16,
            "max_sequence_length": 6,
        },
        inputs.masked_inputs,
    ),
    family("ltx", "LTXVideoTransformer3DModel", _LTX, inputs.ltx_inputs),
    family("ltx2", "LTX2VideoTransformer3DModel", _LTX2, inputs.ltx2_inputs),
    family(
        "cosmos",
        "CosmosTransformer3DModel",
        _LATENTS
        | {
            "mlp_ratio": 2,
            "text_embed_dim": 24,
            "adaln_lora_dim": 8,
            "max_size": (4, 16, 16),
            "concat_padding_mask": False,
        },
        lambda draw: inputs.video_inputs(draw, fps=24),
    ),
    family(
        "cosmos3-omni",
        "Cosmos3OmniTransformer",
        {
            "head_dim": 16,
            "hidden_size": 32,
            "intermediate_size": 64,
            "latent_channel": 4,
            "num_attention_heads": 2,
            "num_hidden_layers": 3,
            "num_key_value_heads": 1,
            "patch_latent_dim": 16,
            "vocab_size": 32,
            "rope_axes_dim": (4, 2, 2),
        },
        inputs.cosmos3_inputs,
    ),
    family(
        "easyanimate",
        "EasyAnimateTransformer3DModel",
        _LATENTS
        | {
            "num_layers": 4,
            "mmdit_layers": 2,
            "patch_size": 2,
            "sample_width": 4,
            "sample_height": 4,
            "time_embed_dim": 16,
            "text_embed_dim": 24,
        },
        inputs.video_inputs,
    ),
    family(
        "kandinsky5", "Kandinsky5Transformer3DModel", _KANDINSKY | _TEXT, inputs.kandinsky5_inputs
    ),
    family(
        "kandinsky6",
        "Kandinsky6Transformer3DModel",
        _KANDINSKY
        | _TEXT
        | {
            "in_audio_dim": 6,
            "out_audio_dim": 6,
            "model_dim_a": 16,
            "ff_dim_a": 32,
            "axes_dims_a": (4, 2, 2),
        },
        inputs.kandinsky6_inputs,
    ),
    family(
        "kandinsky6-sr",
        "Kandinsky6SRTransformer3DModel",
        _KANDINSKY | {"nabla_window": (3, 3, 3)},
        lambda draw: {"hidden_states": draw(1, 2, 8, 8, 9), "timestep": draw.times(500.0)},
    ),
    family("sana-video", "SanaVideoTransformer3DModel", _SANA, inputs.video_inputs),
    family(
        "sana-wm",
        "SanaWMTransformer3DModel",
        {
            "in_channels": 4,
            "num_layers": 4,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "linear_head_dim": 16,
            "softmax_every_n": 2,
            "chunk_plucker_channels": 6,
            "chunk_plucker_post_attn_blocks": 4,
            "caption_channels": 24,
            "image_size": 32,
        },
        inputs.sana_wm_inputs,
    ),
    family(
        "sana-wm-refiner",
        "SanaWMLTX2RefinerTransformer3DModel",
        _LTX2 | {"rope_type": "split"},
        inputs.refiner_inputs,
    ),
    family(
        "minimax-h3",
        "MiniMaxH3Transformer3DModel",
        _HEADS
        | {
            "hidden_size": 32,
            "num_refiner_layers": 2,
            "ffn_dim": 48,
            "in_channels": 4,
            "audio_in_channels": 6,
            "text_dim": 24,
            "freq_dim": 16,
            "time_embed_hidden_dim": 16,
            "time_embed_dim": 16,
            "rope_freq_dim": 2,
        },
        inputs.minimax_h3_inputs,
    ),
    family(
        "motif-video",
        "MotifVideoTransformer3DModel",
        _LATENTS
        | {
            "num_layers": 2,
            "num_single_layers": 3,
            "num_decoder_layers": 1,
            "text_embed_dim": 24,
            "image_embed_dim": 16,
            "rope_axes_dim": (4, 6, 6),
            "enable_text_cross_attention_dual": True,
            "enable_text_cross_attention_single": True,
        },
        lambda draw: inputs.masked_inputs(draw, image_embeds=draw(1, 3, 16)),
    ),
)
