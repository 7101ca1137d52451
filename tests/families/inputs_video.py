"""What the video models of `catalogue_video` and `catalogue_hunyuan` take."""

from __future__ import annotations

from typing import Any

import torch

from tests.families.family import Draw, Inputs

FRAMES, SIDE, TEXT = 2, 4, 6


def video_inputs(draw: Draw, channels: int = 4, **more: Any) -> Inputs:
    """Return a latent video, a text and a timestep."""
    return {
        "hidden_states": draw(1, channels, FRAMES, SIDE, SIDE),
        "encoder_hidden_states": draw(1, TEXT, 24),
        "timestep": draw.ints(500),
        **more,
    }


def masked_inputs(draw: Draw, **more: Any) -> Inputs:
    """Return a latent video and a masked text."""
    return video_inputs(draw) | {"encoder_attention_mask": draw.true(1, TEXT)} | more


def cogvideox_inputs(draw: Draw) -> Inputs:
    """Return a latent video, frames before channels."""
    return video_inputs(draw) | {"hidden_states": draw(1, FRAMES, 4, SIDE, SIDE)}


def consisid_inputs(draw: Draw) -> Inputs:
    """Return a latent video, frames before channels, and the face that it shows."""
    return cogvideox_inputs(draw) | {
        "id_cond": draw(1, 8),
        "id_vit_hidden": [draw(1, 3, 8) for _ in range(2)],
    }


def allegro_inputs(draw: Draw) -> Inputs:
    """Return a latent video and a text whose mask is made of numbers."""
    return video_inputs(draw, encoder_attention_mask=draw.ones(1, TEXT))


def ltx_inputs(draw: Draw) -> Inputs:
    """Return the tokens of a latent video and the size that they come from."""
    return {
        "hidden_states": draw(1, 32, 8),
        "encoder_hidden_states": draw(1, TEXT, 24),
        "timestep": draw.ints(500),
        "encoder_attention_mask": draw.true(1, TEXT),
        "num_frames": FRAMES,
        "height": SIDE,
        "width": SIDE,
    }


def ltx2_inputs(draw: Draw) -> Inputs:
    """Return the tokens of a latent video and of its sound."""
    return ltx_inputs(draw) | {
        "audio_hidden_states": draw(1, 5, 8),
        "audio_encoder_hidden_states": draw(1, TEXT, 24),
        "audio_encoder_attention_mask": draw.true(1, TEXT),
        "audio_num_frames": 5,
    }


def kandinsky5_inputs(draw: Draw) -> Inputs:
    """Return a latent video, channels last, with the positions of its patches."""
    return {
        "hidden_states": draw(1, FRAMES, SIDE, SIDE, 4),
        "encoder_hidden_states": draw(1, TEXT, 24),
        "timestep": draw.times(500.0),
        "pooled_projections": draw(1, 20),
        "visual_rope_pos": tuple(
            torch.arange(size, device=draw.device) for size in (FRAMES, SIDE // 2, SIDE // 2)
        ),
        "text_rope_pos": torch.arange(TEXT, device=draw.device),
    }


def kandinsky6_inputs(draw: Draw) -> Inputs:
    """Return a latent video, channels last, and a sound."""
    return {
        "hidden_states": draw(1, FRAMES, SIDE, SIDE, 9),
        "encoder_hidden_states": draw(1, TEXT, 24),
        "pooled_projections": draw(1, 20),
        "timestep": draw.times(500.0),
        "audio_hidden_states": draw(1, 5, 6),
    }


def pooled_inputs(draw: Draw) -> Inputs:
    """Return the inputs of HunyuanVideo: a masked text, a pooled text and the guidance."""
    return masked_inputs(draw, pooled_projections=draw(1, 20), guidance=draw.times(6000.0))


def hunyuan15_inputs(draw: Draw) -> Inputs:
    """Return a latent video, two texts and an image."""
    return masked_inputs(
        draw,
        encoder_hidden_states_2=draw(1, 4, 20),
        encoder_attention_mask_2=draw.true(1, 4),
        image_embeds=draw(1, 3, 16),
        timestep=draw.floats(500.0),
    )


def framepack_inputs(draw: Draw) -> Inputs:
    """Return a latent video and its history at three lengths."""

    def frames(first: int, count: int) -> torch.Tensor:
        return torch.arange(first, first + count, device=draw.device)

    return pooled_inputs(draw) | {
        "image_embeds": draw(1, 3, 16),
        "indices_latents": frames(9, FRAMES),
        "latents_clean": draw(1, 4, 2, 8, 8),
        "indices_latents_clean": frames(7, 2),
        "latents_history_2x": draw(1, 4, 2, 8, 8),
        "indices_latents_history_2x": frames(5, 2),
        "latents_history_4x": draw(1, 4, 4, 8, 8),
        "indices_latents_history_4x": frames(1, 4),
        "hidden_states": draw(1, 4, FRAMES, 8, 8),
    }


def hunyuan_image_inputs(draw: Draw) -> Inputs:
    """Return a latent image, a masked text and the guidance."""
    return masked_inputs(draw) | {
        "hidden_states": draw(1, 4, SIDE, SIDE),
        "timestep": draw.floats(500.0),
        "guidance": draw.floats(3500.0),
    }


def minimax_h3_inputs(draw: Draw) -> Inputs:
    """Return one packed sequence: a text, a video and a sound, at two noise levels."""
    text, video, audio = 4, 8, 3
    rows = torch.arange(text + video + audio, device=draw.device)
    return {
        "hidden_states": draw(1, video, 16),
        "audio_hidden_states": draw(1, audio, 6),
        "encoder_hidden_states": draw(1, text, 24),
        "timestep": draw.times(0.0, 0.5),
        "timestep_indices": draw.ints(*[0] * text, *[1] * (video + audio)),
        "token_tags": draw.ints(*[1] * text, *[0] * video, *[2] * audio),
        "position_ids": rows[:, None].expand(-1, 3).contiguous(),
        "text_indices": rows[:text],
        "video_indices": rows[text : text + video],
        "audio_indices": rows[text + video :],
    }


def sana_wm_inputs(draw: Draw) -> Inputs:
    """Return a latent video with one timestep for each frame."""
    return {
        "hidden_states": draw(1, 4, FRAMES, SIDE, SIDE),
        "timestep": draw.ints(500, 500)[None, None],
        "encoder_hidden_states": draw(1, 1, TEXT, 24),
        "encoder_attention_mask": draw.ints(*[1] * TEXT)[None],
        "chunk_plucker": draw(1, 6, FRAMES, SIDE, SIDE),
    }


def refiner_inputs(draw: Draw) -> Inputs:
    """Return the tokens of a latent video, each with its timestep and rotation."""
    angles = draw(1, 2, 8, 8).float()
    return {
        "hidden_states": draw(1, 8, 8),
        "encoder_hidden_states": draw(1, TEXT, 24),
        "timestep": draw.times(*[500.0] * 8)[None],
        "video_rotary_emb": (angles.cos(), angles.sin()),
        "encoder_attention_mask": draw.ones(1, TEXT),
    }


def cosmos3_inputs(draw: Draw) -> Inputs:
    """Return one packed sequence: a text, then the patches of two frames."""
    patches = FRAMES * SIDE
    rows = torch.arange(TEXT + patches, device=draw.device)
    return {
        "input_ids": draw.below(32, TEXT),
        "text_indexes": rows[:TEXT],
        "position_ids": rows[None].expand(3, -1).contiguous(),
        "und_len": TEXT,
        "sequence_length": TEXT + patches,
        "vision_tokens": [draw(1, 4, FRAMES, SIDE, SIDE)],
        "vision_token_shapes": [(FRAMES, SIDE // 2, SIDE // 2)],
        "vision_sequence_indexes": rows[TEXT:],
        "vision_mse_loss_indexes": rows[TEXT:],
        "vision_timesteps": draw.times(*[500.0] * patches),
        "vision_noisy_frame_indexes": [torch.arange(FRAMES, device=draw.device)],
    }
