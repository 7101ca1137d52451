"""Weights of which only a part may be pinned, on a real link."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import blockswap

MIB = 2**20
STEPS = 12

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("host_memory", ["64MiB", "256MiB"])
def test_unpinned_weights_stream_bit_identical_within_the_bound(host_memory: str) -> None:
    blocks = [nn.Sequential(nn.Linear(4096, 4096), nn.Tanh()) for _ in range(12)]
    model = nn.Sequential(*blocks).requires_grad_(False)
    x = torch.randn(64, 4096, device="cuda")
    model.cuda()
    expected = [model(x * (1 + step)) for step in range(STEPS)]
    model.cpu()
    with (
        torch.no_grad(),
        blockswap.attach(
            model, device="cuda", offload="1TB", host_memory=host_memory, check=True
        ) as session,
    ):
        outputs = [model(x * (1 + step)) for step in range(STEPS)]
        for output, wanted in zip(outputs, expected, strict=True):
            assert torch.equal(output, wanted)
        report = session.report()
    # A leaf of 64 MiB does not fit beside the ring under the smaller bound.
    assert 0 < report.bounce_bytes <= report.pinned_bytes <= int(host_memory[:-3]) * MIB
