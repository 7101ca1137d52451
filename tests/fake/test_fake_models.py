"""Small models of the real classes give the same bits on the fake accelerator as on the CPU.

They prove the fake, not blockswap: every other test of a session on it rests on this.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

diffusers = pytest.importorskip("diffusers")


def flux():
    model = diffusers.FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8), guidance_embeds=True,
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(1, 16, 4),
        "encoder_hidden_states": torch.randn(1, 8, 32),
        "pooled_projections": torch.randn(1, 32),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([3.5]),
        "img_ids": torch.randint(0, 4, (16, 3)).float(),
        "txt_ids": torch.zeros(8, 3),
    }
    return model, inputs


def sdxl():
    model = diffusers.UNet2DConditionModel(
        sample_size=16, block_out_channels=(32, 64), layers_per_block=1, attention_head_dim=(2, 4),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=(1, 2),
        use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=80, cross_attention_dim=64, norm_num_groups=8,
    )  # fmt: skip
    inputs = {
        "sample": torch.randn(2, 4, 16, 16),
        "timestep": torch.tensor(7),
        "encoder_hidden_states": torch.randn(2, 5, 64),
        "added_cond_kwargs": {"text_embeds": torch.randn(2, 32), "time_ids": torch.rand(2, 6)},
    }
    return model, inputs


def wan():
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4,
        out_channels=4, text_dim=16, freq_dim=32, ffn_dim=32, num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(1, 4, 2, 8, 8),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 6, 16),
    }
    return model, inputs


def qwen():
    model = diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=16, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.randn(1, 16, 16),
        "encoder_hidden_states": torch.randn(1, 7, 16),
        "encoder_hidden_states_mask": torch.ones(1, 7, dtype=torch.bool),
        "timestep": torch.tensor([0.5]),
        "img_shapes": [[(1, 4, 4)]],
    }
    return model, inputs


MODELS: dict[str, Callable] = {"flux": flux, "sdxl": sdxl, "wan": wan, "qwen": qwen}


def moved(value, device, dtype):
    if isinstance(value, dict):
        return {key: moved(item, device, dtype) for key, item in value.items()}
    if isinstance(value, torch.Tensor):
        return value.to(device, dtype if value.is_floating_point() else None)
    return value


@pytest.mark.parametrize("random_delays", [False, True], ids=["steady", "random delays"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_model_gives_the_bits_of_the_cpu(device_module, name, dtype, random_delays):
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    model = model.to(dtype).eval()
    expected = model(**moved(inputs, "cpu", dtype), return_dict=False)[0]

    model.to("fake")
    on_device = moved(inputs, "fake", dtype)
    device_module.synchronize()
    device_module.clear_sync_fallbacks()
    if random_delays:
        device_module.set_random_delays(seed=1, max_seconds=0.001)
    actual = model(**on_device, return_dict=False)[0]
    assert actual.device.type == "fake"
    assert torch.equal(actual.cpu(), expected)
    assert device_module.sync_fallback_reasons() == {}
