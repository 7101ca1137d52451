"""Which of a pipeline's components stream, and which come whole."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import T5Config, T5EncoderModel

from blockswap.bench import zoo
from blockswap.components import MOST_WHOLE_BYTES, Components
from blockswap.config import SwapConfig


def encoder(num_layers: int) -> T5EncoderModel:
    """A T5-XXL encoder of so many layers, without memory."""
    with torch.device("meta"):
        config = T5Config(
            d_model=4096,
            d_ff=10240,
            d_kv=64,
            num_heads=64,
            num_layers=num_layers,
            feed_forward_proj="gated-gelu",
        )
        return T5EncoderModel(config).to(torch.bfloat16)


@pytest.mark.parametrize(("num_layers", "streams"), [(2, False), (6, True), (24, True)])
def test_an_encoder_of_more_than_two_gib_streams_and_a_smaller_one_comes_whole(
    num_layers: int, streams: bool
) -> None:
    parts: Any = {
        "transformer": zoo.build("flux", "tiny", torch.float32, "cpu", 0),
        "text_encoder_2": encoder(num_layers),
    }
    num_bytes = sum(p.nbytes for p in parts["text_encoder_2"].parameters())
    assert (num_bytes > MOST_WHOLE_BYTES) is streams
    found = Components.of(SimpleNamespace(components=parts), SwapConfig(device="cpu"))
    assert list(found.denoisers) == ["transformer"]
    assert list(found.visitors) == (["text_encoder_2"] if streams else [])
    assert [guest.name for guest in found.guests] == ([] if streams else ["text_encoder_2"])
