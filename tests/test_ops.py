"""The two custom ops, as PyTorch's own checker and as users in grad mode see them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import blockswap

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.gpu),
]


def attached(device: str) -> tuple[nn.Module, blockswap.Session]:
    model = nn.Sequential(*[nn.Linear(128, 128) for _ in range(4)]).requires_grad_(False)
    return model, blockswap.attach(model, device=device, offload="1GB")


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck_passes_on_a_live_session(device: str) -> None:
    model, session = attached(device)
    x = torch.ones(1, 128, device=device)
    with torch.no_grad():
        model(x)
    token = session._state.token
    weights = [torch.randn(4, 4, device=device), torch.randn(4, device=device)]
    torch.library.opcheck(torch.ops.blockswap.acquire_.default, (token, weights))
    outputs = [torch.randn(2, 2, device=device), torch.randn(3, device=device)]
    torch.library.opcheck(torch.ops.blockswap.release_.default, (token, outputs, weights))
    session.detach()


@pytest.mark.parametrize("device", DEVICES)
def test_both_ops_refuse_tensors_that_require_grad(device: str) -> None:
    _, session = attached(device)
    weights = [torch.ones(2, device=device, requires_grad=True)]
    plain = [torch.ones(2, device=device)]
    with pytest.raises(RuntimeError, match="no_grad"):
        torch.ops.blockswap.acquire_(session._state.token, weights)
    with pytest.raises(RuntimeError, match="no_grad"):
        torch.ops.blockswap.release_(session._state.token, plain, weights)
    with pytest.raises(RuntimeError, match="no_grad"):
        torch.ops.blockswap.release_(session._state.token, weights, plain)
    with torch.no_grad():
        torch.ops.blockswap.acquire_(session._state.token, weights)
        torch.ops.blockswap.release_(session._state.token, plain, weights)
    session.detach()


@pytest.mark.parametrize("device", DEVICES)
def test_both_ops_run_once_per_streamed_piece_in_steady_state(device: str) -> None:
    model, session = attached(device)
    x = torch.ones(1, 128, device=device)
    with torch.no_grad():
        for _ in range(12):
            model(x)
        assert session.state == "ready"
        with torch.profiler.profile() as profiler:
            model(x)
    names = [event.name for event in profiler.events()]
    copies = session.report().copies_per_step
    assert copies > 0
    assert names.count("blockswap::acquire_") == copies
    assert names.count("blockswap::release_") == copies
    session.detach()
