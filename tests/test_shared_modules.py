"""A module of two models, or of two blocks: streamed by one session, or refused before anything."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from session_models import (
    Stack,
    assert_same,
    assert_unchanged,
    attach,
    attach_ready,
    describe,
    make_input,
    make_stack,
    steps,
)
from torch import nn

import blockswap
from blockswap.errors import ConfigError

X = make_input()
Share = Callable[[Stack, Stack], None]


def share_block(first: Stack, second: Stack) -> None:
    second.blocks[2] = first.blocks[4]


def share_leaf(first: Stack, second: Stack) -> None:
    second.blocks[2].up = first.blocks[4].up


def share_outside(first: Stack, second: Stack) -> None:
    second.inp = first.inp


def make_two(share: Share) -> tuple[Stack, Stack, list[torch.Tensor]]:
    """Two models that share, and what they give."""
    first, second = make_stack(), make_stack(seed=1)
    share(first, second)
    return first, second, [steps(model, X)[0] for model in (first, second)]


SHARES = [(share_block, "blocks.2", "blocks.4"), (share_leaf, "blocks.2.up", "blocks.4.up")]
SHARES += [(share_outside, "inp", "inp")]


@pytest.mark.parametrize(("share", "name", "theirs"), SHARES)
def test_second_session_on_a_shared_module_is_refused_by_name_and_changes_nothing(
    share: Share, name: str, theirs: str
) -> None:
    first, second, expected = make_two(share)
    session = attach_ready(first, X, offload="4MiB")
    before = describe(first)
    text = rf"Stack\.{name} is Stack\.{theirs} of another model, .*attach\(a, b, \.\.\.\).*deepcopy"
    with pytest.raises(ConfigError, match=text):
        attach(second, offload="4MiB")
    assert "_blockswap_session" not in vars(second)
    assert describe(first).keys() == before.keys()
    assert torch.equal(steps(first, X)[0], expected[0])
    session.detach()
    attach(second, offload="4MiB")
    assert all(torch.equal(out, expected[1]) for out in steps(second, X, 12))


@pytest.mark.parametrize("offload", ["4MiB", "1GB"])
@pytest.mark.parametrize("share", [share_block, share_leaf, share_outside])
def test_one_session_streams_models_that_share_a_module(share: Share, offload: str) -> None:
    first, second, expected = make_two(share)
    before = [describe(model) for model in (first, second)]
    with blockswap.attach(first, second, device="cpu", check=True, offload=offload) as session:
        for _ in range(20):
            assert torch.equal(steps(first, X)[0], expected[0])
            assert torch.equal(steps(second, X)[0], expected[1])
        assert session.state == "ready"
    for model, was in zip((first, second), before, strict=True):
        assert_unchanged(model, was)


def test_leaf_of_two_blocks_of_one_model_streams() -> None:
    model, right = make_stack(), make_stack()
    for each in (model, right):
        each.blocks[4].up = each.blocks[1].up
    attach_ready(model, X, offload="1GB")
    assert_same(model, right, X, 4)


def test_resuming_beside_a_session_that_has_a_module_now_is_refused_and_leaves_it_paused() -> None:
    first, second, expected = make_two(share_block)
    session = attach(first, offload="4MiB")
    session.pause()
    with attach(second, offload="4MiB"):
        with pytest.raises(ConfigError, match="of another model, which is attached"):
            session.resume()
        assert session.state == "paused"
        assert torch.equal(steps(second, X)[0], expected[1])
    session.resume()
    assert all(torch.equal(out, expected[0]) for out in steps(first, X, 3))


def test_edit_that_brings_a_module_of_another_session_detaches_the_edited_model() -> None:
    first, second = make_stack(), make_stack(seed=1)
    right = copy.deepcopy(first)
    one, other = (attach_ready(model, X, offload="4MiB") for model in (first, second))
    second.blocks[2].up = first.blocks[4].up
    with pytest.raises(ConfigError, match=r"Stack\.blocks\.2\.up is Stack\.blocks\.4\.up"):
        steps(second, X)
    assert (one.state, other.state) == ("ready", "detached")
    assert_same(first, right, X, 2)


def test_modules_without_weights_and_tied_weights_are_no_hindrance() -> None:
    first, second = make_stack(), make_stack(seed=1)
    first.act = second.act = nn.SiLU()
    second.blocks[2].up.weight = first.blocks[4].up.weight
    expected = [steps(model, X)[0] for model in (first, second)]
    with attach(first, offload="1GB"), attach(second, offload="1GB"):
        for _ in range(12):
            assert torch.equal(steps(first, X)[0], expected[0])
            assert torch.equal(steps(second, X)[0], expected[1])
