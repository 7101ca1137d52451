"""Whole pipelines on a GPU: the same picture, other components on it only for their turn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import blockswap
from tests.pipelines import draw, make

pytestmark = pytest.mark.gpu


def on_gpu(call: dict[str, Any]) -> dict[str, Any]:
    return {k: v.to("cuda") if isinstance(v, torch.Tensor) else v for k, v in call.items()}


@pytest.mark.parametrize("kind", ["sdxl", "flux", "wan", "sd3", "qwen"])
def test_pipeline_draws_the_same_picture(kind: str, tmp_path: Path) -> None:
    pipe, call = make(kind, tmp_path)
    call = on_gpu(call)
    pipe.to("cuda")
    expected = draw(pipe, call)
    pipe.to("cpu")
    with blockswap.attach(pipe, device="cuda", offload="4MB", check=True) as session:
        assert pipe._execution_device.type == "cuda"
        for _ in range(3):
            assert np.array_equal(draw(pipe, call), expected)
        for guest in session._guests:
            weight = next(guest.module.parameters())
            assert weight.device.type == "cpu" and weight.is_pinned()
            assert guest.report().pinned_bytes >= guest.weight_bytes
    weight = next(pipe.vae.parameters())
    assert weight.device.type == "cpu" and not weight.is_pinned()


def test_cap_holds_over_text_encoders_and_denoiser(tmp_path: Path) -> None:
    pipe, call = make("flux", tmp_path)
    call["output_type"] = "latent"
    weights = sum(p.nbytes for p in pipe.transformer.parameters())
    torch.cuda.empty_cache()
    cap = torch.cuda.memory_allocated() + weights // 2 + 96 * 2**20
    with blockswap.attach(pipe, device="cuda", vram=cap, offload=4) as session:
        draw(pipe, call, steps=8)
        torch.cuda.reset_peak_memory_stats()
        draw(pipe, call)
        pool = session.report().parts["transformer"].pool_bytes
        assert torch.cuda.max_memory_allocated() + pool <= cap
