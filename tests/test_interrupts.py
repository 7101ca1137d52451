"""Ctrl-C between any two lines of ours: the weights are whole, and the next forward runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from interrupting import OURS, is_interrupted
from session_models import (
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

import blockswap
from blockswap.errors import UseError

X = make_input()
HALF = "4MiB"


@pytest.mark.slow
@pytest.mark.parametrize("num_steps", [0, 2, 12], ids=["first", "learning", "ready"])
def test_a_forward_that_is_interrupted_anywhere_is_followed_by_a_right_one(num_steps: int) -> None:
    model, right = make_pair()
    before = describe(model)
    session = attach(model, offload=HALF)
    steps(model, X, num_steps)
    at = 1
    while is_interrupted(lambda: steps(model, X), at):
        assert_same(model, right, X, 1)
        if num_steps < 12:  # learn from the begin
            session.detach()
            assert_unchanged(model, before)
            session = attach(model, offload=HALF)
            steps(model, X, num_steps)
        at += 7 if num_steps == 12 else 41
    assert at > 150
    session.detach()
    assert_unchanged(model, before)


@pytest.mark.slow
def test_weights_are_whole_right_after_an_interrupted_forward() -> None:
    model, _ = make_pair()
    before = bits_of(model)
    session = attach_ready(model, X, offload=HALF)
    at = 1
    while is_interrupted(lambda: steps(model, X), at):
        if not session.gate.is_open:  # else it is open until it is seen that nobody runs
            assert bits_of(model) == before, at
        at += 5
    assert at > 150


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "then"),
    [("pause", "pause"), ("pause", "resume"), ("detach", "detach"), ("vacate", "vacate")],
)
def test_what_ends_a_session_may_be_interrupted_anywhere_and_done_again(
    name: str, then: str
) -> None:
    model, right = make_pair()
    before = describe(model)
    at = 1
    while True:
        session = attach(model, offload=HALF)
        steps(model, X, 3)
        if not is_interrupted(getattr(session, name), at):
            break
        if then == name:
            assert_same(model, right, X, 1)
        getattr(session, then)()
        assert_same(model, right, X, 1)
        session.detach()
        assert_unchanged(model, before)
        at += 13
    assert at > 100


@pytest.mark.slow
def test_attaching_may_be_interrupted_anywhere_and_leaves_no_trace() -> None:
    model, right = make_pair()
    before = describe(model)
    at = 1
    while is_interrupted(lambda: attach(model, offload=HALF), at):
        found = blockswap.attached.session_of(model)
        if found is not None:  # all was done but to return it
            found.detach()
        assert_unchanged(model, before)
        assert_same(model, right, X, 1)
        at += 97
    assert at > 1000


@pytest.mark.slow
@pytest.mark.parametrize("act", ["learn", "vacate"])
def test_a_change_of_what_lies_on_the_device_may_be_interrupted_anywhere(act: str) -> None:
    model, right = make_pair()
    before = describe(model)
    at = 1
    while True:
        session = attach(model, offload=HALF)
        if act == "vacate":
            steps(model, X, 6)
        change = session.vacate if act == "vacate" else lambda: steps(model, X, 6)
        if not is_interrupted(change, at, within=OURS + "placement.py"):
            break
        assert_same(model, right, X, 4)
        session.detach()
        assert_unchanged(model, before)
        at += 3 if act == "learn" else 1
    assert at > 20


def test_a_session_is_refused_to_whoever_runs_it_already() -> None:
    model, right = make_pair()
    session = attach_ready(model, X, offload=HALF)
    refused = []

    def meddle(*_: Any) -> None:
        for act in (session.pause, session.detach, session.vacate):
            with pytest.raises(UseError, match="a forward runs"):
                act()
            refused.append(act)

    handle = model.blocks[2].up.register_forward_hook(meddle)
    steps(model, X)
    handle.remove()
    assert len(refused) == 3
    assert_same(model, right, X, 2)
    assert torch.is_grad_enabled()
