"""Edits of diffusers on the fake accelerator, whose memory the host cannot read by chance."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import nn

import blockswap
from blockswap.errors import CapError
from tests.accelerator.test_sessions import MIB, STEPS, Chain
from tests.pipelines import draw, make


def cast(pipe: Any) -> None:
    pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn)


def first_block(pipe: Any) -> None:
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=1.0))


@pytest.mark.parametrize(
    ("edit", "offload"), [(cast, "4MB"), (first_block, "1GB")], ids=["casting", "cache"]
)
def test_edit_draws_what_it_draws_on_an_unswapped_pipeline(
    accelerator: ModuleType, edit: Callable[[Any], None], offload: str, tmp_path: Path
) -> None:
    (right, call), (pipe, _) = make("flux", tmp_path), make("flux", tmp_path)
    call |= {"height": 64, "width": 64, "output_type": "latent"}
    right.to("fake")
    plain = draw(right, call)
    edit(right)
    expected = draw(right, call)
    assert not np.array_equal(expected, plain)
    with blockswap.attach(pipe, device="fake", offload=offload, check=True):
        assert np.array_equal(draw(pipe, call), plain)
        edit(pipe)
        for _ in range(4):
            assert np.array_equal(draw(pipe, call), expected)


def test_cast_weights_leave_the_device_with_their_leaf(
    accelerator: ModuleType, tmp_path: Path
) -> None:
    pipe, call = make("flux", tmp_path)
    call |= {"height": 64, "width": 64, "output_type": "latent"}
    whole = sum(p.nbytes for p in pipe.transformer.transformer_blocks.parameters())
    cast(pipe)
    with blockswap.attach(pipe, device="fake", offload="1GB", check=True) as session:
        draw(pipe, call, 10)
        before = accelerator.memory_allocated()
        accelerator.reset_peak_memory_stats()
        draw(pipe, call, 2)
        assert accelerator.max_memory_allocated() - before < whole / 2
        assert session.state == "ready"


@torch.no_grad()
def test_leaf_larger_than_the_cap_that_an_edit_brings_is_refused_with_numbers(
    accelerator: ModuleType, base: int
) -> None:
    model = Chain([256] * 5, seed=1).eval()
    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(1))
    session = blockswap.attach(model, device="fake", check=True, vram=base + 4 * MIB)
    for _ in range(STEPS):
        model(x.to("fake"))
    model.layers[2] = nn.Sequential(*Chain([256, 8192, 256], seed=2).layers)
    right = copy.deepcopy(model.layers[2])
    with pytest.raises(CapError, match=r"a ring of 8\.0 MiB for layers\.2\.0\.0") as raised:
        model(x.to("fake"))
    if sys.version_info >= (3, 11):
        assert "the session is detached" in raised.value.__notes__[-1]
    assert session.state == "detached"
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    for layer in model.layers[:2]:
        x = layer(x)
    assert torch.equal(model.layers[2](x), right(x))
