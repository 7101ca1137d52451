"""Caches and skipped layers of diffusers skip with an attached pipeline what they skip without."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.hooks import HookRegistry, apply_faster_cache, apply_layer_skip
from peft import LoraConfig
from pipeline_pair import Edit, Pair, denoiser_of, loading, lora
from torch import nn

pytestmark = pytest.mark.usefixtures("one_thread")


def first_block(threshold: float) -> Edit:
    # What random blocks add differs more from step to step than what trained ones add.
    config = diffusers.FirstBlockCacheConfig(threshold)
    return lambda pipe: pipe.transformer.enable_cache(config)


def faster(pipe: Any) -> None:
    pipe.transformer.enable_cache(
        diffusers.FasterCacheConfig(
            spatial_attention_timestep_skip_range=(-1, 800),  # not in the first step
            spatial_attention_block_identifiers=("blocks.*attn",),
            current_timestep_callback=lambda: pipe._current_timestep,
            attention_weight_callback=lambda _: 0.3,
            is_guidance_distilled=True,
        )
    )


def faster_without_negative(pipe: Any) -> None:
    """Compute in every second step half of the batch: without the negative prompt."""
    config = diffusers.FasterCacheConfig(
        spatial_attention_timestep_skip_range=(-1, 1001),
        unconditional_batch_skip_range=2,
        unconditional_batch_timestep_skip_range=(-1, 1001),
        current_timestep_callback=lambda: 500,
        attention_weight_callback=lambda _: 0.3,
        tensor_format="BCHW",
        _unconditional_conditional_input_kwargs_identifiers=[
            *("hidden_states", "encoder_hidden_states", "timestep", "pooled_projections")
        ],
    )
    apply_faster_cache(pipe.transformer, config)


def skipping(**config: Any) -> Edit:
    return lambda pipe: apply_layer_skip(
        pipe.transformer, diffusers.LayerSkipConfig([1, 2], **config)
    )


def take_off(pipe: Any) -> None:
    if getattr(pipe.transformer, "is_cache_enabled", False):
        pipe.transformer.disable_cache()
        return
    registry = HookRegistry.check_if_exists_or_initialize(pipe.transformer)
    for name in ("faster_cache_denoiser", "faster_cache_block", "layer_skip_hook"):
        registry.remove_hook(name, recurse=True)


def count_rows(pipe: Any) -> SimpleNamespace:
    """Count the rows of input that go through the blocks' Linears."""
    counted = SimpleNamespace(rows=0)

    def count(_module: nn.Module, args: Any) -> None:
        counted.rows += args[0].shape[0]

    for name, module in denoiser_of(pipe).named_modules():
        if isinstance(module, nn.Linear) and "blocks." in name:
            module.register_forward_pre_hook(count)
    return counted


def steps_of(both: Pair, draws: int) -> int:
    """Return how many steps the session counts while both draw; blocks alone count, too."""
    before = both.session.report().parts["transformer"].steps
    both.draw(draws)
    return int(both.session.report().parts["transformer"].steps - before)


CASES: dict[str, tuple[str, Edit, str]] = {
    "first block, flux": ("flux", first_block(1.0), "half"),
    "first block, wan": ("wan", first_block(1.0), "all"),
    "first block, qwen": ("qwen", first_block(3.0), "half"),
    "faster, flux": ("flux", faster, "all"),
    "faster, wan": ("wan", faster, "half"),
    "faster, sd3": ("sd3", faster_without_negative, "all"),
    "faster, sd3, residents": ("sd3", faster_without_negative, "half"),
    "layers, wan": ("wan", skipping(), "half"),
    "feed-forward, flux": (
        "flux",
        skipping(fqn="transformer_blocks", skip_attention=False),
        "half",
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("when", ["between calls", "between steps"])
def test_what_is_skipped_is_skipped_as_on_an_unswapped_pipeline(
    case: str, when: str, tmp_path: Path
) -> None:
    kind, enable, offload = CASES[case]
    both = Pair(kind, tmp_path, offload)
    counted = [count_rows(pipe) for pipe in (both.pipe, both.right)]
    plain = both.draw(6)
    whole = counted[1].rows
    for each in counted:
        each.rows = 0
    if when == "between steps":
        skipped = both.draw_while([enable], steps=6)
    else:
        both.edit(enable)
        skipped = both.draw(6)
    assert counted[0].rows == counted[1].rows < whole
    assert not np.array_equal(skipped, plain)
    both.edit(take_off)
    assert np.array_equal(both.draw(6), plain)
    both.edit(enable)
    both.session.detach()
    both.draw(6)


@pytest.mark.parametrize("case", ["first block, flux", "faster, sd3, residents"])
def test_cache_stays_on_while_adapters_come_and_go(case: str, tmp_path: Path) -> None:
    kind, enable, offload = CASES[case]
    both = Pair(kind, tmp_path, offload)
    counted = [count_rows(pipe) for pipe in (both.pipe, both.right)]
    plain = both.draw(6)
    whole = counted[1].rows
    both.edit(enable)
    both.edit(loading(lora(kind, 1, tmp_path), "one"))
    for edit in (lambda _: None, lambda pipe: pipe.unload_lora_weights()):
        both.edit(edit)
        for each in counted:
            each.rows = 0
        assert not np.array_equal(both.draw(6), plain)
        assert counted[0].rows == counted[1].rows < whole
    both.edit(take_off)
    assert np.array_equal(both.draw(6), plain)
    both.settle()
    assert steps_of(both, draws=6) == 6


def test_model_runs_as_a_whole_when_a_cache_has_been_taken_off(tmp_path: Path) -> None:
    both = Pair("flux", tmp_path, "half")
    plain = both.draw()
    both.edit(faster)

    def adapt(pipe: Any) -> None:  # past the pipeline, which would take the shim off and on
        torch.manual_seed(0)
        config = LoraConfig(r=4, target_modules=["to_q"], init_lora_weights=False)
        pipe.transformer.add_adapter(config)

    both.edit(adapt)
    assert not np.array_equal(both.draw(), plain)
    both.edit(take_off)
    both.draw()
    both.settle()
    assert steps_of(both, draws=6) == 6
