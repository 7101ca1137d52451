"""What the models of `catalogue_audio` take."""

from __future__ import annotations

import torch

from tests.families.family import Draw, Inputs

FRAMES, TEXT = 8, 6


def ace_step_inputs(draw: Draw) -> Inputs:
    """Return a latent sound, what it is made from, and two times."""
    return {
        "hidden_states": draw(1, FRAMES, 4),
        "timestep": draw.floats(0.75),
        "timestep_r": draw.floats(0.5),
        "encoder_hidden_states": draw(1, TEXT, 24),
        "context_latents": draw(1, FRAMES, 8),
    }


def stable_audio_inputs(draw: Draw) -> Inputs:
    """Return a latent sound, a text, a duration and rotations."""
    return {
        "hidden_states": draw(1, 4, FRAMES),
        "timestep": draw.ints(500),
        "encoder_hidden_states": draw(1, TEXT, 24),
        "global_hidden_states": draw(1, 1, 20),
        "rotary_embedding": (draw(FRAMES + 1, 8).float(), draw(FRAMES + 1, 8).float()),
    }


def stable_audio3_inputs(draw: Draw) -> Inputs:
    """Return a latent sound, a text with padding, a duration and a mask to fill."""
    mask = draw.true(1, TEXT)
    mask[:, -2:] = False
    return {
        "hidden_states": draw(1, 4, FRAMES),
        "timestep": draw.floats(0.5),
        "encoder_hidden_states": draw(1, TEXT, 24),
        "global_hidden_states": draw(1, 20),
        "encoder_attention_mask": mask,
        "local_add_cond": draw(1, 5, FRAMES),
    }


def longcat_inputs(draw: Draw) -> Inputs:
    """Return a latent sound, a text and a latent sound to follow."""
    return {
        "hidden_states": draw(1, FRAMES, 4),
        "encoder_hidden_states": draw(1, TEXT, 24),
        "encoder_attention_mask": draw.true(1, TEXT),
        "timestep": draw.floats(0.5),
        "attention_mask": draw.true(1, FRAMES),
        "latent_cond": draw(1, FRAMES, 4),
    }


def protein_inputs(draw: Draw) -> Inputs:
    """Return five residues, the last of them padding."""
    mask = draw.true(1, 5)
    mask[:, -1] = False
    none = torch.zeros_like(mask)
    return {
        "bb_ca": draw(1, 5, 3),
        "local_latents": draw(1, 5, 4),
        "bb_ca_time": draw.times(0.5),
        "local_latents_time": draw.times(0.25),
        "padding_mask": mask,
        "token_type": draw.below(7, 1, 5),
        "conditioning": {
            "is_in_context_conditioning": none,
            "supports_local_latent": mask,
            "bond_mask": draw.below(2, 1, 5, 5),
        },
    }


def feature_map_inputs(draw: Draw) -> Inputs:
    """Return a feature map of a UNet and a text."""
    return {"hidden_states": draw(1, 32, 4, 4), "encoder_hidden_states": draw(1, TEXT, 24)}
