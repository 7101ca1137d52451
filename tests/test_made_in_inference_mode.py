"""Components whose weights were made under inference mode are refused by name."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pipelines import draw, make, with_large_encoder
from torch import nn

import blockswap
from blockswap.errors import ConfigError


def made_anew(model: Any) -> Any:
    """A copy with the same values, made as a script does that loads it in inference mode."""
    with torch.inference_mode():
        return copy.deepcopy(model)


def described(pipe: Any) -> list[list[str]]:
    parts = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    return [sorted(vars(module)) for part in parts for module in part.modules()]


@pytest.mark.parametrize("name", ["transformer", "text_encoder_2"])
def test_component_that_streams_is_refused_with_its_name_and_the_way_out(
    name: str, tmp_path: Path
) -> None:
    pipe, _ = make("flux", tmp_path)
    with_large_encoder(pipe)
    setattr(pipe, name, made_anew(getattr(pipe, name)))
    before = described(pipe)
    text = rf"were made under torch\.inference_mode\(\), the first is 'pipe\.{name}\.\w+.*outside"
    with pytest.raises(ConfigError, match=text):
        blockswap.attach(pipe, device="cpu", vram="28MiB")
    assert described(pipe) == before


def test_component_that_never_moves_is_welcome(tmp_path: Path) -> None:
    pipe, call = make("flux", tmp_path)
    call |= {"height": 64, "width": 64}
    expected = draw(pipe, call)
    pipe.vae = made_anew(pipe.vae)
    with blockswap.attach(pipe, device="cpu", offload="4MB"):
        assert np.array_equal(draw(pipe, call), expected)
