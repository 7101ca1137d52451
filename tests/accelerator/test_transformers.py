"""Text encoders and language models of transformers on the fake accelerator."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

import blockswap
from tests.transformers_models import MODELS, WRITES, make, tokens


@torch.no_grad()
@pytest.mark.parametrize("kind", MODELS)
def test_a_text_model_streams_in_every_mode(accelerator: ModuleType, kind: str) -> None:
    model, ids = make(kind), tokens().to("fake")
    expected = model.to("fake")(input_ids=ids)[0].clone()
    model.to("cpu")
    for options in ({"offload": "1GB"}, {"mode": "layerwise"}, {"offload": 3}):
        with blockswap.attach(model, device="fake", check=True, **options):  # type: ignore[arg-type]
            for _ in range(8):
                assert torch.equal(model(input_ids=ids)[0], expected), options


@torch.no_grad()
@pytest.mark.parametrize("kind", WRITES)
def test_a_language_model_writes_the_same_text(accelerator: ModuleType, kind: str) -> None:
    model, ids = make(kind), tokens().to("fake")
    options = {"max_new_tokens": 8, "do_sample": False, "use_cache": True}
    expected = model.to("fake").generate(input_ids=ids, **options)
    model.to("cpu")
    with blockswap.attach(model, device="fake", offload="400KB", check=True):
        for _ in range(2):
            assert torch.equal(model.generate(input_ids=ids, **options), expected)
