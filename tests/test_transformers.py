"""Text encoders and language models of transformers stream as denoisers do."""

from __future__ import annotations

import pytest
import torch

import blockswap
from tests.transformers_models import MODELS, WRITES, make, tokens


@torch.no_grad()
@pytest.mark.parametrize("kind", MODELS)
def test_a_text_model_gives_the_same_bits_and_streams_all_its_blocks(kind: str) -> None:
    model, ids = make(kind), tokens()
    expected = model(input_ids=ids)[0].clone()
    with blockswap.attach(model, device="cpu", offload="1GB") as session:
        for _ in range(8):
            assert torch.equal(model(input_ids=ids)[0], expected)
        report = session.report()
        assert session.state == "ready"
        assert report.streamed_bytes > 0.9 * report.leaf_bytes
        assert not any("read outside" in note for note in report.notes)
    assert torch.equal(model(input_ids=ids)[0], expected)


@torch.no_grad()
@pytest.mark.parametrize("kind", WRITES)
def test_a_language_model_writes_the_same_text_while_it_streams(kind: str) -> None:
    model, ids = make(kind), tokens()
    options = {"max_new_tokens": 12, "do_sample": False, "use_cache": True}
    expected = model.generate(input_ids=ids, **options)
    with blockswap.attach(model, device="cpu", offload="400KB", check=True):
        for _ in range(2):
            assert torch.equal(model.generate(input_ids=ids, **options), expected)
