"""The text encoders of the T5 family, in their published depth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from blockswap.demo.pipelines import t5_config

NUM_LAYERS = 24


def t5_encoder(full: bool, width: int = 64) -> Callable[[], Any]:
    """Return what builds T5-XXL's encoder of 4.76 billion parameters, or a tiny one that wide."""
    from transformers import T5Config, T5EncoderModel

    return lambda: T5EncoderModel(T5Config(**_config(full, 32128, width)))


def umt5_encoder(full: bool) -> Callable[[], Any]:
    """Return what builds UMT5-XXL's encoder of 5.7 billion parameters, or a tiny one."""
    from transformers import UMT5Config, UMT5EncoderModel

    return lambda: UMT5EncoderModel(UMT5Config(**_config(full, 256384, 64)))


def _config(full: bool, num_tokens: int, width: int) -> dict[str, Any]:
    sizes = {"num_layers": NUM_LAYERS} if full else {"d_model": width}
    return t5_config(full, num_tokens) | sizes
