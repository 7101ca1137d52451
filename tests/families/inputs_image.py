"""What the image models of `catalogue_image` and `catalogue_qwen` take."""

from __future__ import annotations

import torch

from tests.families.family import Draw, Inputs

SIDE, TEXT = 8, 6


def text_inputs(draw: Draw, channels: int = 4, time: float = 500.0) -> Inputs:
    """Return a latent image, a text and a timestep."""
    return {
        "hidden_states": draw(1, channels, SIDE, SIDE),
        "encoder_hidden_states": draw(1, TEXT, 24),
        "timestep": draw.times(time),
    }


def sd3_inputs(draw: Draw) -> Inputs:
    """Return the inputs of Stable Diffusion 3."""
    return text_inputs(draw) | {"pooled_projections": draw(1, 20)}


def sized_inputs(draw: Draw) -> Inputs:
    """Return the inputs of CogView, which are told the size of the image."""
    sizes = {key: draw.floats(64.0, 64.0)[None] for key in ("original_size", "target_size")}
    return text_inputs(draw) | sizes | {"crop_coords": draw.floats(0.0, 0.0)[None]}


def glm_inputs(draw: Draw) -> Inputs:
    """Return a latent image with one token of the prior for each patch."""
    inputs = sized_inputs(draw)
    del inputs["original_size"]
    drop = torch.zeros(1, SIDE * SIDE // 4, dtype=torch.bool, device=draw.device)
    drop[:, :3] = True
    return inputs | {
        "prior_token_id": draw.below(32, 1, SIDE * SIDE // 4),
        "prior_token_drop": drop,
    }


def hunyuan_dit_inputs(draw: Draw) -> Inputs:
    """Return the inputs of HunyuanDiT: two masked texts and rotations."""
    return {
        "hidden_states": draw(1, 4, SIDE, SIDE),
        "timestep": draw.floats(500.0),
        "encoder_hidden_states": draw(1, TEXT, 24),
        "text_embedding_mask": draw.ones(1, TEXT),
        "encoder_hidden_states_t5": draw(1, TEXT, 32),
        "text_embedding_mask_t5": draw.ones(1, TEXT),
        "image_rotary_emb": [draw(16, 16).float(), draw(16, 16).float()],
    }


def lumina_next_inputs(draw: Draw) -> Inputs:
    """Return a latent image, a masked text and the rotation of each patch."""
    angles = torch.polar(draw.zeros(16, 16, 8) + 1.0, draw(16, 16, 8).float())
    inputs = text_inputs(draw, time=0.5)
    inputs["encoder_mask"] = draw.ones(1, TEXT)
    return inputs | {"image_rotary_emb": angles, "cross_attention_kwargs": {}}


def hidream_inputs(draw: Draw) -> Inputs:
    """Return a latent image and the layers of two text encoders."""
    return {
        "hidden_states": draw(1, 4, SIDE, SIDE),
        "timesteps": draw.times(500.0),
        "encoder_hidden_states_t5": draw(1, TEXT, 24),
        "encoder_hidden_states_llama3": draw(2, 1, TEXT, 24),
        "pooled_embeds": draw(1, 20),
    }


def omnigen_inputs(draw: Draw) -> Inputs:
    """Return a latent image behind a text, without images in the prompt."""
    length = TEXT + 1 + SIDE * SIDE // 4
    return {
        "hidden_states": draw(1, 4, SIDE, SIDE),
        "timestep": draw.floats(0.5),
        "input_ids": draw.below(32, 1, TEXT),
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": draw.ones(1, length, length),
        "position_ids": torch.arange(length, device=draw.device)[None],
    }


def tokens_inputs(draw: Draw) -> Inputs:
    """Return patchified tokens of a latent image, as Qwen-Image takes them."""
    return {
        "hidden_states": draw(1, 16, 16),
        "encoder_hidden_states": draw(1, TEXT, 24),
        "encoder_hidden_states_mask": draw.true(1, TEXT),
        "timestep": draw.floats(0.5),
        "img_shapes": [[(1, 4, 4)]],
    }


def qwen21_inputs(draw: Draw) -> Inputs:
    """Return tokens, and where in the joint sequence the image stands."""
    image = torch.zeros(1, TEXT + 4, dtype=torch.bool, device=draw.device)
    image[:, TEXT:] = True
    return tokens_inputs(draw) | {"img_mask": image}


def z_image_inputs(draw: Draw) -> Inputs:
    """Return a list of one image and a list of one caption."""
    return {"x": [draw(4, 1, SIDE, SIDE)], "t": draw.floats(0.5), "cap_feats": [draw(TEXT, 24)]}


def krea_inputs(draw: Draw) -> Inputs:
    """Return tokens of an image and three layers of the text encoder."""
    ids = torch.cat([draw.zeros(TEXT, 3), draw.grid(4, 4)])
    return {
        "hidden_states": draw(1, 16, 16),
        "encoder_hidden_states": draw(1, TEXT, 3, 24),
        "timestep": draw.floats(0.5),
        "position_ids": ids,
        "encoder_attention_mask": draw.true(1, TEXT),
    }


def ideogram_inputs(draw: Draw) -> Inputs:
    """Return one packed sequence: a text, then an image."""
    from diffusers.models.transformers import transformer_ideogram4 as source

    length = TEXT + 16
    roles = [source.LLM_TOKEN_INDICATOR] * TEXT + [source.OUTPUT_IMAGE_INDICATOR] * 16
    return {
        "hidden_states": draw(1, length, 16),
        "timestep": draw.floats(0.5),
        "encoder_hidden_states": draw(1, length, 24),
        "position_ids": torch.cat([draw.zeros(TEXT, 3), draw.grid(4, 4)])[None].long(),
        "segment_ids": draw.ints(*[0] * length)[None],
        "indicator": draw.ints(*roles)[None],
    }


def ernie_inputs(draw: Draw) -> Inputs:
    """Return a latent image and a text with its length."""
    return {
        "hidden_states": draw(1, 4, SIDE, SIDE),
        "timestep": draw.floats(500.0),
        "text_bth": draw(1, TEXT, 24),
        "text_lens": draw.ints(TEXT),
    }


def nucleus_inputs(draw: Draw) -> Inputs:
    """Return tokens and one shape for the whole batch."""
    return tokens_inputs(draw) | {"img_shapes": [(1, 4, 4)]}


def joy_plus_inputs(draw: Draw) -> Inputs:
    """Return the patches of an image to make and of one to edit."""
    return {
        "hidden_states": draw(1, 8, 4, 1, 2, 2),
        "timestep": draw.times(500.0),
        "encoder_hidden_states": draw(1, TEXT, 24),
        "encoder_hidden_states_mask": draw.ones(1, TEXT),
        "shape_list": [[(1, 2, 2), (1, 2, 2)]],
    }
