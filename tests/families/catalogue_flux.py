"""FLUX and the image models that grew from it."""

from __future__ import annotations

from typing import Any

from tests.families.family import Draw, Inputs, family

SIDE, TEXT = 4, 6
_HEADS = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2}
_FLUX = _HEADS | {
    "in_channels": 16,
    "num_single_layers": 3,
    "joint_attention_dim": 24,
    "axes_dims_rope": (4, 6, 6),
}
_POOLED = {"pooled_projection_dim": 20, "guidance_embeds": True}


def flux_inputs(draw: Draw, axes: int = 3, **more: Any) -> Inputs:
    """Return tokens of an image and of a text, with the position of each."""
    return {
        "hidden_states": draw(1, SIDE * SIDE, 16),
        "encoder_hidden_states": draw(1, TEXT, 24),
        "timestep": draw.floats(0.5),
        "img_ids": draw.grid(SIDE, SIDE, axes=axes),
        "txt_ids": draw.zeros(TEXT, axes),
        **more,
    }


def pooled_flux_inputs(draw: Draw) -> Inputs:
    """Return what FLUX.1-dev takes besides: a pooled text and the guidance."""
    pooled = draw(1, 20)
    return flux_inputs(draw, pooled_projections=pooled, guidance=draw.times(3.5))


def chroma_inputs(draw: Draw) -> Inputs:
    """Return the inputs of Chroma, which masks its text."""
    return flux_inputs(draw, attention_mask=draw.true(1, TEXT + SIDE * SIDE))


def bria_fibo_inputs(draw: Draw) -> Inputs:
    """Return one layer of the text encoder for every block."""
    mask = draw.ones(1, 1, 1, TEXT + SIDE * SIDE)
    layers = [draw(1, TEXT, 16) for _ in range(5)]
    return flux_inputs(
        draw, text_encoder_layers=layers, joint_attention_kwargs={"attention_mask": mask}
    )


def fibo2_inputs(draw: Draw) -> Inputs:
    """Return a latent image and three layers of the text encoder."""
    return {
        "hidden_states": draw(1, 4, 8, 8),
        "timestep": draw.floats(0.5),
        "encoder_hidden_states": draw(1, 3, TEXT, 24),
    }


def flux3_inputs(draw: Draw) -> Inputs:
    """Return an image to make and one to look at, so that the blocks of both modes run."""
    ids = draw.grid(2, 2, axes=4)
    return flux_inputs(draw, axes=4, image_cond_hidden_states=draw(1, 4, 16), image_cond_ids=ids)


FAMILIES = (
    family("flux1", "FluxTransformer2DModel", _FLUX | _POOLED, pooled_flux_inputs),
    family(
        "flux2",
        "Flux2Transformer2DModel",
        _FLUX | {"timestep_guidance_channels": 32, "axes_dims_rope": (4, 4, 4, 4)},
        lambda draw: flux_inputs(draw, axes=4, guidance=draw.times(3.5)),
    ),
    family(
        "flux3",
        "Flux3Transformer2DModel",
        _FLUX | {"cond_in_channels": 16, "timestep_channels": 32, "axes_dims_rope": (4, 4, 4, 4)},
        flux3_inputs,
    ),
    family(
        "chroma",
        "ChromaTransformer2DModel",
        _FLUX
        | {
            "approximator_num_channels": 16,
            "approximator_hidden_dim": 32,
            "approximator_layers": 2,
        },
        chroma_inputs,
    ),
    family(
        "bria",
        "BriaTransformer2DModel",
        _FLUX | {"axes_dims_rope": [4, 6, 6]},
        flux_inputs,
    ),
    family(
        "bria-fibo",
        "BriaFiboTransformer2DModel",
        _FLUX | {"axes_dims_rope": [4, 6, 6], "text_encoder_dim": 16},
        bria_fibo_inputs,
    ),
    family(
        "bria-fibo2",
        "BriaFibo2Transformer2DModel",
        {
            "in_channels": 4,
            "dim": 64,  # wide, and deep: the embedding of the time takes 1 MiB at any size
            "n_layers": 8,
            "n_refiner_layers": 2,
            "n_heads": 4,
            "cap_feat_dim": 24,
            "injection_layer_ids": (1, 3),
            "min_num_gist_tokens": 4,
            "max_num_gist_tokens": 8,
            "gist_step": 2,
            "gist_min_text_len": 4,
            "gist_max_text_len": 16,
            "axes_dims": (4, 6, 6),
            "axes_lens": (64, 32, 32),
        },
        fibo2_inputs,
    ),
    family("ovis-image", "OvisImageTransformer2DModel", _FLUX | {"out_channels": 16}, flux_inputs),
    family(
        "longcat-image",
        "LongCatImageTransformer2DModel",
        _FLUX | {"axes_dims_rope": [4, 6, 6], "pooled_projection_dim": 24},
        flux_inputs,
    ),
)
