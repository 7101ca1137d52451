"""Denoisers that only a GPU can stream: the fake accelerator lacks an operator of theirs."""

from __future__ import annotations

import pytest
import torch

import blockswap
from tests.families.catalogue import FAMILIES
from tests.families.family import build, outputs, weight_bytes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
STEPS = 12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["anyflow-far", "kandinsky6-sr"])
def test_family_with_flex_attention_streams_identical(name: str, dtype: torch.dtype) -> None:
    family = next(each for each in FAMILIES if each.name == name)
    model = build(family, dtype).to("cuda")
    inputs = family.inputs(dtype, "cuda")
    wanted = outputs(model, inputs)
    model.to("cpu")
    offload = f"{2 * weight_bytes(model) // 3}B"
    with blockswap.attach(model, device="cuda", offload=offload, check=True) as session:
        for step in range(STEPS):
            got = outputs(model, inputs)
            assert len(got) == len(wanted) > 0
            assert all(map(torch.equal, got, wanted)), f"step {step}"
        assert session.state == "ready"
        assert session.report().streamed_bytes > 0
