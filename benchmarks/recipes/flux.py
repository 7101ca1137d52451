"""FLUX.1, alone and with two LoRAs."""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.recipes.recipe import PROMPT, Recipe, decode_in_tiles
from benchmarks.recipes.source import Source
from benchmarks.recipes.t5 import t5_encoder
from blockswap.demo.pipelines import demo_model

ADAPTERS = {"painting": (32, 0.8), "snow": (16, 0.6)}  # rank and weight
ADAPTED = ("to_q", "to_k", "to_v", "to_out.0")


def flux(source: Source) -> Recipe:
    """FLUX.1-dev: 11.9 billion parameters, CLIP and T5-XXL."""
    from diffusers import FluxPipeline

    size = "full" if source.full else "tiny"
    parts = demo_model("flux", size).components(source.full, source.module, source.folder)
    parts["text_encoder_2"] = source.module(t5_encoder(source.full))  # the demo's is less deep
    pixels = 1024 if source.full else 128
    call = {
        "prompt": PROMPT,
        "height": pixels,
        "width": pixels,
        "guidance_scale": 3.5,
        "max_sequence_length": 512 if source.full else 64,
        "num_inference_steps": 8 if source.full else 4,
    }
    return Recipe(FluxPipeline(**parts), call, decode_in_tiles(source, parts["vae"]))


def flux_loras(source: Source) -> Recipe:
    """FLUX.1-dev with two LoRAs on all attentions, of rank 32 and 16, both active."""
    recipe = flux(source)
    for name, (rank, _) in ADAPTERS.items():
        state = _lora(source, recipe.pipe.transformer, rank)
        recipe.pipe.load_lora_weights(state, adapter_name=name)
    recipe.pipe.set_adapters(list(ADAPTERS), [weight for _, weight in ADAPTERS.values()])
    return recipe


def _lora(source: Source, transformer: nn.Module, rank: int) -> dict[str, torch.Tensor]:
    """Return an adapter as its file holds it."""
    state = {}
    for name, module in transformer.named_modules():
        module = getattr(module, "base_layer", module)  # what an earlier adapter has wrapped
        if isinstance(module, nn.Linear) and name.endswith(ADAPTED):
            down = source.matrix(rank, module.in_features)
            state[f"transformer.{name}.lora_A.weight"] = down
            state[f"transformer.{name}.lora_B.weight"] = source.matrix(module.out_features, rank)
    return state
