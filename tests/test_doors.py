"""The forward in front of a module's own: other tools may have one too, before and after ours."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from session_models import assert_same, attach, make_input, make_pair
from torch import nn

X = make_input()


def put_in_front(module: nn.Module, log: list[str]) -> Any:
    """What accelerate and others do: a forward of theirs in the module's own dict."""
    own = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        log.append("theirs")
        return own(*args, **kwargs)

    module.forward = forward  # type: ignore[method-assign]
    return forward


@pytest.mark.parametrize("where", ["", "blocks.2"])
def test_another_tools_forward_is_called_while_attached_and_stays_afterwards(where: str) -> None:
    model, right = make_pair()
    log: list[str] = []
    theirs = put_in_front(model.get_submodule(where), log)
    with attach(model, offload="1GB"):
        assert_same(model, right, X, 9)
    assert model.get_submodule(where).__dict__["forward"] is theirs
    assert len(log) == 9


@pytest.mark.parametrize("where", ["", "blocks.2"])
def test_a_forward_put_in_front_of_ours_works_on_after_detach(where: str) -> None:
    model, right = make_pair()
    log: list[str] = []
    session = attach(model, offload="1GB")
    theirs = put_in_front(model.get_submodule(where), log)
    assert_same(model, right, X, 9)
    session.detach()
    assert model.get_submodule(where).__dict__["forward"] is theirs
    assert_same(model, right, X, 1)
    with attach(model, offload="1GB"):
        assert_same(model, right, X, 3)
    assert len(log) == 13


def test_a_block_called_alone_runs_right_at_any_time() -> None:
    model, right = make_pair()
    expected = right.blocks[1](X)
    with torch.no_grad(), attach(model, offload="1GB"):
        for _ in range(9):
            assert torch.equal(model.blocks[1](X), expected)
            model(X)
            assert model.blocks[1].up.weight.device.type == "cpu"


def test_a_model_called_while_an_exception_is_handled_learns_all_the_same() -> None:
    model, right = make_pair()
    session = attach(model, offload="1GB")
    try:
        raise RuntimeError("the caller's own")
    except RuntimeError:
        assert_same(model, right, X, 9)
    assert session.state == "ready"
    session.detach()
