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
from diffusers.hooks.smoothed_energy_guidance_utils import (
    _SMOOTHED_ENERGY_GUIDANCE_HOOK as SMOOTHED,
)
from diffusers.hooks.smoothed_energy_guidance_utils import _apply_smoothed_energy_guidance_hook
from peft import LoraConfig
from pipeline_pair import Edit, Pair, loading, lora
from pipelines import denoiser_of
from torch import nn

pytestmark = pytest.mark.usefixtures("one_thread")


def enabling(config: Any) -> Edit:
    return lambda pipe: pipe.transformer.enable_cache(config)


def first_block(threshold: float) -> Edit:
    # What random blocks add differs more from step to step than what trained ones add.
    return enabling(diffusers.FirstBlockCacheConfig(threshold))


def pyramid(pipe: Any) -> None:
    config = diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        cross_attention_block_skip_range=3,
        spatial_attention_timestep_skip_range=(-1, 1001),
        cross_attention_timestep_skip_range=(-1, 1001),
        cross_attention_block_identifiers=("blocks.*attn2",),
        current_timestep_callback=lambda: pipe._current_timestep,
    )
    pipe.transformer.enable_cache(config)


def taylor(**config: Any) -> Edit:
    return enabling(diffusers.TaylorSeerCacheConfig(2, 2, **config))


def magnitudes() -> Edit:
    return enabling(diffusers.MagCacheConfig(9.0, num_inference_steps=6, mag_ratios=[1.0] * 6))


def spectral(order: int) -> Edit:
    return enabling(diffusers.SeaCacheConfig(threshold=9.0, residual_order=order))


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
    if getattr(denoiser_of(pipe), "is_cache_enabled", False):
        denoiser_of(pipe).disable_cache()
        return
    registry = HookRegistry.check_if_exists_or_initialize(denoiser_of(pipe))
    for name in ("faster_cache_denoiser", "faster_cache_block", "layer_skip_hook", SMOOTHED):
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
    "pyramid, flux": ("flux", pyramid, "all"),
    "pyramid, wan": ("wan", pyramid, "half"),
    "taylor, flux": ("flux", taylor(), "all"),
    "taylor, wan": ("wan", taylor(cache_identifiers=[r"blocks\.\d+\.attn1"]), "all"),
    "taylor, qwen": ("qwen", taylor(max_order=2), "half"),
    "taylor lite, flux": ("flux", taylor(use_lite_mode=True), "half"),
    "magnitudes, flux": ("flux", magnitudes(), "half"),
    "magnitudes, wan": ("wan", magnitudes(), "all"),
    "magnitudes, qwen": ("qwen", magnitudes(), "half"),
    "spectral, wan": ("wan", spectral(1), "half"),
    "spectral, wan, as it was": ("wan", spectral(0), "all"),
    "text, nucleus": ("nucleus", enabling(diffusers.TextKVCacheConfig()), "half"),
    "text, nucleus, all": ("nucleus", enabling(diffusers.TextKVCacheConfig()), "all"),
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
    is_exact = case.startswith("text")
    assert np.array_equal(skipped, plain) == is_exact
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


@pytest.mark.parametrize(
    ("kind", "blocks", "offload"),
    [
        ("sdxl", "mid_block.attentions.0.transformer_blocks", "half"),
        ("sd3", "auto", "all"),
        ("wan", "auto", "half"),
        ("qwen", "auto", "all"),
    ],
)
def test_queries_are_smoothed_as_on_an_unswapped_pipeline(
    kind: str, blocks: str, offload: str, tmp_path: Path
) -> None:
    def smooth(pipe: Any) -> None:
        config = diffusers.SmoothedEnergyGuidanceConfig([0], fqn=blocks)
        _apply_smoothed_energy_guidance_hook(denoiser_of(pipe), config, blur_sigma=1.0)

    both = Pair(kind, tmp_path, offload)
    plain = both.draw(4)
    # A guider of diffusers does both around one forward of three, in each step.
    assert not np.array_equal(both.draw_while([smooth, take_off, smooth]), plain)
    both.edit(take_off)
    assert np.array_equal(both.draw(4), plain)
    both.edit(smooth)
    assert not np.array_equal(both.draw(4), plain)
    both.session.detach()
    both.draw(4)
