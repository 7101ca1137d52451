"""Every denoiser of diffusers streams bit for bit, and comes back as it was."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from session_models import describe
from torch import nn

import blockswap
from blockswap.blocks import find_blocks
from tests.families.catalogue import EXCLUDED, FAMILIES, REPLACED_BY_FORWARD
from tests.families.family import (
    Family,
    build,
    build_meta,
    class_of,
    denoiser_classes,
    outputs,
    weight_bytes,
)

pytestmark = [  # of diffusers and of torch, about the models
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
STEPS = 9  # learning takes six or seven
MAIN_SHARE = 0.5  # of the bytes: what blocks hold at least
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    """Toy models are slower on several threads; what is slow to import is no test's time."""
    class_of(FAMILIES[0])
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def assert_equal(got: list[torch.Tensor], wanted: list[torch.Tensor], when: str) -> None:
    """Compare all tensors of two outputs."""
    assert len(got) == len(wanted) > 0
    for index, (one, other) in enumerate(zip(got, wanted, strict=True)):
        assert torch.equal(one, other), f"{when}: output {index} differs"


def snapshot(family: Family, model: nn.Module) -> dict[str, Any]:
    """Return what every module of the model is and has, attribute by attribute."""
    found = describe(model)
    for name, module in model.named_modules():
        for key, value in module.__dict__.items():
            if isinstance(value, dict):  # of hooks, of tensors: compared by what they hold
                found[f"{name}.{key}"] = {"type": type(value), "keys": list(value)}
            else:
                found[f"{name}.{key}"] = {"type": type(value), "object": id(value)}
    for key in REPLACED_BY_FORWARD.get(family.name, ()):
        del found[key]["object"]
    return found


def assert_no_trace(after: dict[str, Any], before: dict[str, Any]) -> None:
    """Compare two snapshots; a failure names what differs."""
    assert list(after) == list(before)
    different = [key for key in before if after[key] != before[key]]
    assert not different, {key: (before[key], after[key]) for key in different[:3]}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_family_streams_identical_and_leaves_no_trace(family: Family, dtype: str) -> None:
    model = build(family, DTYPES[dtype])

    def forward() -> list[torch.Tensor]:
        return outputs(model, family.inputs(DTYPES[dtype], "cpu"))

    wanted = forward()
    assert all(tensor.isfinite().all() and tensor.float().std() > 0 for tensor in wanted)
    before = snapshot(family, model)
    offload = f"{2 * weight_bytes(model) // 3}B"
    session = blockswap.attach(model, device="cpu", offload=offload, check=True)
    try:
        for step in range(STEPS):
            assert_equal(forward(), wanted, f"step {step}")
        assert session.state == "ready"
        assert session.report().streamed_bytes > 0
    finally:
        session.detach()
    assert_no_trace(snapshot(family, model), before)
    assert_equal(forward(), wanted, "after detach")
    assert_no_trace(snapshot(family, model), before)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_blocks_are_found_and_hold_most_of_the_weights(family: Family) -> None:
    model = build_meta(family)
    blocks = find_blocks(model)
    held = weight_bytes(nn.ModuleList(block.module for block in blocks))
    assert len(blocks) > 1
    assert held >= MAIN_SHARE * weight_bytes(model)


def test_every_denoiser_of_diffusers_is_in_the_catalogue_or_excluded() -> None:
    covered = {family.cls_name for family in FAMILIES}
    known = covered | EXCLUDED.keys()
    found = denoiser_classes().keys()
    assert not covered & EXCLUDED.keys()
    assert not found - known, "neither in the catalogue nor excluded"
    assert not known - found, "no such class in this version of diffusers"
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)
