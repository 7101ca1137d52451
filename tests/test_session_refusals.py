"""What a session refuses while it lives: the refusal changes nothing and names the way out."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from session_models import (
    Stack,
    assert_same,
    assert_unchanged,
    attach,
    attach_ready,
    bits_of,
    describe,
    make_input,
    make_pair,
    steps,
)
from torch import nn

from blockswap.errors import UseError

X = make_input()
HALF = "4MiB"
ALL = "1GB"  # everything streams


@contextmanager
def forward_in_another_thread(model: Stack) -> Iterator[list[torch.Tensor]]:
    """A forward that stands still before ``blocks.2.mix`` until the end; then its output."""
    inside, go_on = threading.Event(), threading.Event()

    def wait(*_: Any) -> None:
        if threading.current_thread() is thread:
            inside.set()
            go_on.wait(60)

    outputs: list[torch.Tensor] = []
    handle = model.blocks[2].mix.register_forward_pre_hook(wait)
    thread = threading.Thread(target=lambda: outputs.extend(steps(model, X)), daemon=True)
    thread.start()
    try:
        assert inside.wait(60)
        yield outputs
    finally:
        handle.remove()
        go_on.set()
        thread.join(60)
    assert not thread.is_alive()


def test_second_thread_is_refused_and_the_first_stays_right() -> None:
    model, right = make_pair()
    session = attach_ready(model, X, offload=ALL)
    with forward_in_another_thread(model) as outputs:
        for part in (model, model.blocks[2], model.blocks[4]):
            with pytest.raises(UseError, match="two forwards of Stack at once"):
                steps(part, X)
        for act in (session.pause, session.detach):
            with pytest.raises(UseError, match="a forward runs"):
                act()
    assert torch.equal(outputs[0], steps(right, X)[0])
    assert_same(model, right, X, 2)


@pytest.mark.parametrize("leaf", ["blocks.2.up", "blocks.2.mix", "blocks.4.up", "blocks.0.mix"])
def test_leaf_called_by_a_second_thread_is_refused_or_right(leaf: str) -> None:
    model, right = make_pair()
    attach_ready(model, X, offload=ALL, block_size="300KiB")
    x = torch.randn(3, model.get_submodule(leaf).in_features)
    with forward_in_another_thread(model) as outputs:
        try:
            got = steps(model.get_submodule(leaf), x)[0]
        except UseError:
            got = steps(right.get_submodule(leaf), x)[0]
    assert torch.equal(got, steps(right.get_submodule(leaf), x)[0])
    assert torch.equal(outputs[0], steps(right, X)[0])
    assert_same(model, right, X, 2)


def test_leaf_that_would_fetch_for_a_second_thread_is_refused() -> None:
    model, right = make_pair()
    attach_ready(model, X, offload=ALL, block_size="300KiB")
    x = torch.randn(3, model.blocks[4].up.in_features)
    refused = pytest.raises(UseError, match="two forwards of Stack at once")
    with forward_in_another_thread(model) as outputs, refused:
        steps(model.blocks[4].up, x)
    assert torch.equal(outputs[0], steps(right, X)[0])


def test_attaching_inside_a_forward_is_refused() -> None:
    model, right = make_pair()
    before = describe(model)

    def attach_now(*_: Any) -> None:
        attach(model, offload=HALF)

    handle = model.blocks[2].register_forward_pre_hook(attach_now)
    with pytest.raises(UseError, match="a forward of Stack runs: attach before or after it"):
        steps(model, X)
    handle.remove()
    assert_unchanged(model, before)
    attach(model, offload=HALF)
    assert_same(model, right, X, 2)


@pytest.mark.parametrize("act", [copy.deepcopy, pickle.dumps])
def test_copying_an_attached_model_is_refused_with_the_way_out(act: Callable[[Any], Any]) -> None:
    model, right = make_pair()
    attach_ready(model, X, offload=HALF)
    with pytest.raises(UseError, match=r"session\.pause\(\)"):
        act(model)
    assert_same(model, right, X, 1)


@pytest.mark.parametrize("offload", [0, HALF, ALL])
@pytest.mark.parametrize("leaf", ["blocks.4.mix", "blocks.1.norm"])
def test_weight_changed_during_a_forward_is_refused_and_not_kept(
    leaf: str, offload: int | str
) -> None:
    model, right = make_pair()
    attach_ready(model, X, offload=offload)

    def write(module: nn.Module, args: Any) -> None:
        module.get_parameter("bias").add_(1.0)

    handle = model.get_submodule(leaf).register_forward_pre_hook(write)
    with pytest.raises(UseError, match=r"bias changed during a forward.*pause"):
        steps(model, X)
    handle.remove()
    assert bits_of(model) == bits_of(right)
    assert_same(model, right, X, 2)
