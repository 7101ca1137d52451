"""A pipeline whose denoiser or encoder could not be taken in anew: what is told leads out."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig

import blockswap
from blockswap.errors import CapError, UseError
from blockswap.steward import Steward
from tests.accelerator.test_pipelines import MIB, on_fake
from tests.pipelines import draw, make, with_large_encoder


def adapt(model: Any, target: str) -> None:
    torch.manual_seed(3)
    model.add_adapter(LoraConfig(r=4, target_modules=[target], init_lora_weights=False))


@pytest.mark.parametrize(
    ("part", "target", "vram"),
    [("transformer", "to_q", None), ("transformer", "to_q", 20), ("text_encoder_2", "q", 20)],
)
def test_attach_streams_again_after_memory_was_short_for_an_adapter(
    accelerator: ModuleType,
    part: str,
    target: str,
    vram: int | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (right, call), (pipe, _) = make("flux", tmp_path), make("flux", tmp_path)
    call |= {"height": 64, "width": 64, "output_type": "latent"}
    for each in (right, pipe):
        with_large_encoder(each)
    plain = on_fake(right, call)
    adapt(getattr(right, part), target)
    expected = on_fake(right, call)
    assert not np.array_equal(expected, plain)
    options: dict[str, Any] = {"offload": "4MB"}
    if vram is not None:
        options = {"vram": accelerator.memory_allocated() + vram * MIB}

    def none_left(_: Steward) -> None:
        raise CapError("another program has taken it")

    broken = blockswap.attach(pipe, device="fake", **options)
    assert np.array_equal(draw(pipe, call), plain)
    adapt(getattr(pipe, part), target)
    with monkeypatch.context() as patch:
        patch.setattr(Steward, "start", none_left)
        with pytest.raises(CapError, match="another program"):
            draw(pipe, call)
    assert broken.state == "detached"
    for _ in range(2):
        with pytest.raises(UseError, match=rf"pipe\.{part} is detached.*attach\(pipe, .* again"):
            draw(pipe, call)
    with pytest.raises(UseError, match=r"blockswap\.attach again"):
        broken.resume()
    session = blockswap.attach(pipe, device="fake", **options)
    assert session is not broken
    for _ in range(2):
        assert np.array_equal(draw(pipe, call), expected)
    assert session.sessions[part].report().steps > 0
    session.detach()
    assert {p.device.type for p in getattr(pipe, part).parameters()} == {"cpu"}
    assert np.array_equal(on_fake(pipe, call), expected)
