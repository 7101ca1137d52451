"""Text encoders that do not fit under the cap, and language models, on a GPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import blockswap
from tests.pipelines import draw, make, with_large_encoder
from tests.transformers_models import MODELS, tokens
from tests.transformers_models import make as make_text_model

pytestmark = pytest.mark.gpu
MIB = 2**20


def test_a_text_encoder_that_does_not_fit_streams_and_the_cap_holds(tmp_path: Path) -> None:
    pipe, call = make("flux", tmp_path)
    call["output_type"] = "latent"
    with_large_encoder(pipe, blocks=160)  # 320 MiB
    pipe.to("cuda")
    expected = draw(pipe, call)
    pipe.to("cpu")
    torch.cuda.empty_cache()
    cap = torch.cuda.memory_reserved() + 112 * MIB
    with blockswap.attach(pipe, vram=cap, check=True) as session:
        assert list(session.sessions) == ["transformer", "text_encoder_2"]
        for _ in range(8):
            assert np.array_equal(draw(pipe, call), expected)
        # It finds room beside what the denoiser keeps.
        denoiser, seen = session.sessions["transformer"], set()
        held = denoiser.report().pool_bytes
        handle = pipe.text_encoder_2.encoder.block[80].register_forward_hook(
            lambda *_: seen.add(denoiser.report().pool_bytes)
        )
        assert np.array_equal(draw(pipe, call), expected)
        handle.remove()
        assert seen == {held} and held > 0
        for part in session.report().parts.values():
            assert part.peak_device_bytes is not None and part.peak_device_bytes <= cap
        assert session.report().parts["text_encoder_2"].streamed_bytes > 300 * MIB
        assert session.sessions["text_encoder_2"].report().pool_bytes == 0


@torch.no_grad()
@pytest.mark.parametrize("kind", MODELS)
def test_a_text_model_streams(kind: str) -> None:
    model, ids = make_text_model(kind), tokens().cuda()
    expected = model.cuda()(input_ids=ids)[0].clone()
    model.cpu()
    with blockswap.attach(model, offload="1GB", check=True):
        for _ in range(8):
            assert torch.equal(model(input_ids=ids)[0], expected)
