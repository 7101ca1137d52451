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
