"""An edit that `attach` would refuse is refused by the next forward: then the model is detached."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from session_edits import noise, remove_block, replace_block
from session_models import (
    HIDDEN,
    Stack,
    assert_same,
    attach,
    attach_ready,
    make_input,
    make_pair,
    steps,
)
from torch import nn

from blockswap.errors import CapError, ConfigError, UnsupportedError

X = make_input()


def widen(model: Stack) -> None:
    """Put 16 MiB into each of two leaves of a block."""
    block = model.blocks[2]
    block.up = nn.Linear(HIDDEN, 64 * HIDDEN).requires_grad_(False)
    block.down = nn.Linear(64 * HIDDEN, HIDDEN).requires_grad_(False)
    for parameter in (*block.up.parameters(), *block.down.parameters()):
        parameter.copy_(noise(parameter))


def made_in_inference_mode(model: Stack) -> None:
    with torch.inference_mode():
        leaf = nn.Linear(HIDDEN, 2 * HIDDEN).requires_grad_(False)
        leaf.load_state_dict(model.blocks[2].up.state_dict())
    model.blocks[2].up = leaf


def of_a_subclass(model: Stack) -> None:
    class Subclass(nn.Parameter):
        pass

    values = model.blocks[2].up.weight.detach().clone()
    model.blocks[2].up.register_parameter("more", Subclass(values, requires_grad=False))


@pytest.mark.parametrize(
    ("edit", "options", "error", "text"),
    [
        (widen, {"vram": "8MiB"}, CapError, r"needs .*16\..* MiB.*cap is 8\.0 MiB.*blocks\.2\.up"),
        (widen, {"offload": "4MiB", "swap_space": "2MiB"}, ConfigError, r"swap_space is 2\.0 MiB"),
        (remove_block, {"offload": 6}, ConfigError, "offload=6 blocks but the model has 5"),
        (
            made_in_inference_mode,
            {"offload": "4MiB"},
            ConfigError,
            r"blocks\.2\.up\.weight.*outside",
        ),
        (of_a_subclass, {"offload": "4MiB"}, UnsupportedError, r"blocks\.2\.up\.more.*Subclass"),
    ],
    ids=["cap", "ring", "count", "inference mode", "subclass"],
)
@torch.no_grad()
def test_edit_that_attach_would_refuse_is_refused_in_its_words_and_detaches(
    edit: Callable[[Any], None], options: dict[str, Any], error: type[Exception], text: str
) -> None:
    model, right = make_pair()
    session = attach_ready(model, X, **options)
    edit(model)
    edit(right)
    with pytest.raises(error, match=text) as raised:
        model(X)
    assert type(raised.value) is error
    assert session.state == "detached"
    assert_same(model, right, X, 2)
    assert_same(copy.deepcopy(model), right, X, 1)  # an ordinary model
    with pytest.raises(error, match=text):
        attach(model, **options)


@torch.no_grad()
def test_edited_model_attaches_again_under_the_cap_that_the_error_names() -> None:
    model, right = make_pair()
    attach_ready(model, X, vram="8MiB")
    widen(model)
    widen(right)
    with pytest.raises(CapError, match="raise vram"):
        steps(model, X)
    attach(model, vram="20MiB")
    assert_same(model, right, X, 12)


@pytest.mark.parametrize("edit", [replace_block, remove_block])
@torch.no_grad()
def test_blocks_that_came_or_went_while_paused_are_taken_in(edit: Callable[[Stack], None]) -> None:
    model, right = make_pair()
    session = attach_ready(model, X, offload="4MiB")
    session.pause()
    edit(model)
    edit(right)
    session.resume()
    assert_same(model, right, X, 12)
    assert session.state == "ready"


@torch.no_grad()
def test_edit_while_paused_that_attach_would_refuse_leaves_the_session_paused() -> None:
    model, right = make_pair()
    session = attach_ready(model, X, vram="8MiB")
    session.pause()
    kept = model.blocks[2]
    for stack in (model, right):
        replace_block(stack)
        widen(stack)
    with pytest.raises(CapError, match=r"needs .*16\..* MiB.*cap is 8\.0 MiB.*blocks\.2\.up"):
        session.resume()
    assert session.state == "paused"
    assert_same(model, right, X, 2)
    assert_same(copy.deepcopy(model), right, X, 1)  # an ordinary model
    for stack in (model, right):
        stack.blocks[2] = kept
    session.resume()
    assert_same(model, right, X, 12)
    assert session.state == "ready"
