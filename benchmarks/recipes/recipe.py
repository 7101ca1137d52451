"""A whole pipeline, ready to be called: what a recipe returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.recipes.source import Source

PROMPT = "a red fox in the snow"


@dataclass(frozen=True)
class Recipe:
    """One pipeline of a real class, and how it is called.

    Attributes:
        pipe: weights random, on the source's device.
        call: arguments of the pipeline, the same in every run.
        tiling: what of the VAE works in parts, in every run.
        note: what is not as published.
    """

    pipe: Any
    call: dict[str, Any]
    tiling: str = "none"
    note: str = ""


MakeRecipe = Callable[[Source], Recipe]


def decode_in_tiles(source: Source, vae: Any) -> str:
    """Have the VAE decode in tiles; as published, a tile would be the whole image."""
    pixels = 512 if source.full else 64
    vae.enable_tiling()
    vae.tile_sample_min_size = pixels
    vae.tile_latent_min_size = pixels // 2 ** (len(vae.config.block_out_channels) - 1)
    return f"the VAE decodes tiles of {pixels}x{pixels}"
