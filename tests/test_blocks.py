"""Blocks are found in what a model declares, or else in its structure."""

from collections import Counter

import pytest
import torch
from sound_blocks import assert_sound, names
from torch import nn

from blockswap.bench import zoo
from blockswap.blocks import Block, find_blocks, list_counts
from blockswap.errors import ConfigError


def classes(blocks):
    return Counter(type(block.module).__name__ for block in blocks)


def num_parameters(modules):
    return sum({p: p.numel() for m in modules for p in m.parameters()}.values())


class Layer(nn.Module):
    def __init__(self, width=8, depth=0):
        super().__init__()
        self.fc = nn.Linear(width, width)
        if depth:
            self.inner = nn.ModuleList(Layer(width) for _ in range(depth))

    def forward(self, x):
        return self.fc(x)


class Model(nn.Module):
    """A model that calls nothing and declares nothing: only its structure counts."""

    def __init__(self, **children):
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


# --- real models at full size, on the meta device ------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "num_parameters_expected", "counts", "by_class"),
    [
        (
            "flux",
            11_901_408_320,
            {"transformer_blocks": 19, "single_transformer_blocks": 38},
            {"FluxTransformerBlock": 19, "FluxSingleTransformerBlock": 38},
        ),
        (
            "sdxl",
            2_567_463_684,
            {"down_blocks": 30, "up_blocks": 45, "mid_block": 12},
            {"BasicTransformerBlock": 70, "ResnetBlock2D": 17},
        ),
        ("wan", 14_288_491_584, {"blocks": 40}, {"WanTransformerBlock": 40}),
        ("qwen", 20_430_401_088, {"transformer_blocks": 60}, {"QwenImageTransformerBlock": 60}),
    ],
)
def test_published_models_have_their_blocks_found(kind, num_parameters_expected, counts, by_class):
    model = zoo.build_meta(kind, "full")
    blocks = find_blocks(model)
    assert_sound(model, blocks)
    assert list_counts(blocks) == counts
    assert classes(blocks) == by_class
    assert num_parameters([model]) == num_parameters_expected
    assert num_parameters(b.module for b in blocks) > 0.97 * num_parameters_expected


def test_models_without_declarations_give_their_named_lists():
    from diffusers import FluxControlNetModel, LTXVideoTransformer3DModel

    with torch.device("meta"):
        control = FluxControlNetModel(num_layers=5, num_single_layers=10)
        ltx = LTXVideoTransformer3DModel(num_layers=4)
    assert list_counts(find_blocks(control)) == {
        "transformer_blocks": 5,
        "single_transformer_blocks": 10,
    }
    assert list_counts(find_blocks(ltx)) == {"transformer_blocks": 4}


def test_controlnet_and_vae_give_inner_blocks_not_whole_stages():
    from diffusers import AutoencoderKL, ControlNetModel

    with torch.device("meta"):
        control = ControlNetModel(block_out_channels=(32, 64, 64, 64), cross_attention_dim=32)
        vae = AutoencoderKL(
            block_out_channels=(32, 64), down_block_types=["DownEncoderBlock2D"] * 2
        )
    blocks = find_blocks(control)
    assert_sound(control, blocks)
    assert classes(blocks) == {"BasicTransformerBlock": 7, "ResnetBlock2D": 10}
    assert set(list_counts(blocks)) == {"down_blocks", "mid_block"}
    blocks = find_blocks(vae)
    assert_sound(vae, blocks)
    assert classes(blocks).keys() == {"ResnetBlock2D"}
    assert "encoder.down_blocks" in list_counts(blocks)


def test_vace_has_both_of_its_lists():
    from diffusers import WanVACETransformer3DModel

    with torch.device("meta"):
        model = WanVACETransformer3DModel(num_layers=4, vace_layers=[0, 2])
    assert list_counts(find_blocks(model)) == {"blocks": 4, "vace_blocks": 2}


def test_declared_embedders_that_are_not_repeated_are_no_blocks():
    from diffusers import HunyuanVideoTransformer3DModel

    with torch.device("meta"):
        model = HunyuanVideoTransformer3DModel(num_layers=2, num_single_layers=3)
    assert "HunyuanVideoTokenRefiner" in model._repeated_blocks
    assert list_counts(find_blocks(model)) == {
        "transformer_blocks": 2,
        "single_transformer_blocks": 3,
    }


def test_declared_blocks_may_stand_outside_a_list_where_there_are_several():
    model = Model(first=Layer(), second=Layer(), head=nn.Linear(8, 8))
    model._repeated_blocks = {"Layer"}  # transformers keeps a set on the instance
    assert find_blocks(model) == [Block(n, "", getattr(model, n)) for n in ("first", "second")]


def test_text_encoders_nest_their_lists_one_level_down():
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    t5 = T5EncoderModel(
        T5Config(d_model=16, d_kv=4, d_ff=32, num_layers=3, num_heads=4, vocab_size=50)
    )
    clip = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=4,
            num_attention_heads=2,
            vocab_size=50,
        )
    )
    assert list_counts(find_blocks(t5)) == {"encoder.block": 3}
    assert classes(find_blocks(t5)) == {"T5Block": 3}
    (list_name, count), *rest = list_counts(find_blocks(clip)).items()
    assert list_name.endswith("encoder.layers")
    assert (count, rest) == (4, [])


def test_two_towers_of_a_vision_language_model_are_both_found():
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 64,
        },
        vision_config={"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4},
    )
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config)
    found = classes(find_blocks(model))
    assert found == {"Qwen2_5_VLDecoderLayer": 3, "Qwen2_5_VLVisionBlock": 2}


def test_parts_of_a_wrapper_are_believed():
    wrapper = Model(denoiser=zoo.build_meta("flux", "tiny"), other=zoo.build_meta("sdxl", "tiny"))
    assert list_counts(find_blocks(wrapper)) == {
        "denoiser.transformer_blocks": 2,
        "denoiser.single_transformer_blocks": 3,
        "other.down_blocks": 4,
        "other.up_blocks": 8,
        "other.mid_block": 4,
    }


# --- structure -----------------------------------------------------------------------------------


def test_repeated_siblings_are_found_at_any_depth_and_outermost_wins():
    model = Model(body=Model(stack=nn.ModuleList(Layer(depth=2) for _ in range(3))), head=Layer())
    blocks = find_blocks(model)
    assert_sound(model, blocks)
    assert names(blocks) == ["body.stack.0", "body.stack.1", "body.stack.2"]
    assert {b.list_name for b in blocks} == {"body.stack"}


def test_stages_of_different_sizes_give_what_they_repeat():
    stages = nn.ModuleList(
        Model(parts=nn.ModuleList(Layer(width) for _ in range(3))) for width in (8, 16)
    )
    assert list_counts(find_blocks(Model(stages=stages))) == {
        "stages.0.parts": 3,
        "stages.1.parts": 3,
    }


def test_sequence_of_plain_layers_is_cut_at_each_that_holds_weights():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Flatten())
    assert find_blocks(model) == [Block("0", "", model[0]), Block("2", "", model[2])]


def test_small_embedder_beside_real_blocks_is_left_alone():
    embedder = nn.Sequential(nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 8))
    model = Model(embedder=embedder, stack=nn.ModuleList(Layer(32) for _ in range(4)))
    assert set(list_counts(find_blocks(model))) == {"stack"}


def test_lists_inside_lists_are_opened_since_a_list_cannot_be_called():
    grid = nn.ModuleList(nn.ModuleList(Layer() for _ in range(2)) for _ in range(3))
    blocks = find_blocks(Model(grid=grid))
    assert list_counts(blocks) == {"grid.0": 2, "grid.1": 2, "grid.2": 2}


def test_module_that_is_listed_twice_is_one_block():
    shared = Layer()
    model = Model(blocks=nn.ModuleList([shared, Layer(), shared]))
    assert names(find_blocks(model)) == ["blocks.0", "blocks.1"]


def test_blocks_without_parameters_are_skipped():
    model = Model(layers=nn.ModuleList([Layer(), nn.ReLU(), Layer(), nn.Identity()]))
    assert names(find_blocks(model)) == ["layers.0", "layers.2"]


def test_model_without_blocks_is_refused_with_what_was_seen_and_the_way_out():
    with pytest.raises(ConfigError, match=r"Layer x1.*Linear x1.*blocks=\["):
        find_blocks(Model(only=Layer()))
    with pytest.raises(ConfigError, match="Classes seen: none"):
        find_blocks(nn.Linear(2, 2))
