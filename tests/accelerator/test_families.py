"""Every denoiser of diffusers on the fake accelerator: the same bits while copies run beside it."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

import blockswap
from tests.families.catalogue import FAMILIES
from tests.families.family import Family, build, outputs, weight_bytes

pytestmark = [  # of diffusers and of torch, about the models
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
STEPS = 12  # learning takes up to ten where the host sets the pace
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# PyTorch's FlexAttention knows four kinds of device by name; tests/gpu/test_families.py has these.
FLEX = ("anyflow-far", "kandinsky6-sr")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "family", [each for each in FAMILIES if each.name not in FLEX], ids=lambda family: family.name
)
def test_family_streams_identical_on_an_accelerator(
    accelerator: ModuleType, family: Family, dtype: str
) -> None:
    model = build(family, DTYPES[dtype])

    def forward(device: str) -> list[torch.Tensor]:
        return [t.cpu() for t in outputs(model, family.inputs(DTYPES[dtype], device))]

    on_cpu = forward("cpu")
    model.to("fake")
    wanted = forward("fake")
    model.to("cpu")
    accelerator.set_copy_delay(1e-9, 2e-5)
    offload = f"{2 * weight_bytes(model) // 3}B"
    with blockswap.attach(model, device="fake", offload=offload, check=True) as session:
        for step in range(STEPS):
            got = forward("fake")
            assert len(got) == len(wanted) > 0
            assert all(map(torch.equal, got, wanted)), f"step {step}"
        assert session.state == "ready"
        assert session.report().streamed_bytes > 0
    assert all(map(torch.equal, forward("cpu"), on_cpu)), "after detach"


@pytest.mark.parametrize("name", FLEX)
def test_family_with_flex_attention_runs_on_no_such_device_unswapped_either(
    accelerator: ModuleType, name: str
) -> None:
    family = next(each for each in FAMILIES if each.name == name)
    model = build(family, torch.float32).to("fake")
    with pytest.raises(ValueError, match="FlexAttention is only supported on"):
        outputs(model, family.inputs(torch.float32, "fake"))
