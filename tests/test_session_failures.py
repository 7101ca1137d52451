"""Taking a model may fail at any place: it is then an ordinary model, as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from session_models import (
    assert_same,
    assert_unchanged,
    attach,
    attach_ready,
    describe,
    make_input,
    make_pair,
)

X = make_input()
HALF = "4MiB"

PLACES = [
    ("blockswap.host.Host.__init__", MemoryError),
    ("blockswap.fixed.FixedTensors.to_device", OSError),
    ("blockswap.host.Host.take", MemoryError),
    ("blockswap.steward.Steward.start", RuntimeError),
    ("blockswap.link.Link.measure", KeyboardInterrupt),
    ("blockswap.session.Hooks", RuntimeError),
    ("blockswap.hooks._Door.open", KeyboardInterrupt),
    ("blockswap.model_state.Casts.take", KeyboardInterrupt),
]


@pytest.mark.parametrize(("place", "error"), PLACES)
def test_failure_while_attaching_leaves_the_model_as_it_was(
    monkeypatch: pytest.MonkeyPatch, place: str, error: type[BaseException]
) -> None:
    model, right = make_pair()
    before = describe(model)

    def fail(*_: Any, **__: Any) -> None:
        raise error("from a test")

    with monkeypatch.context() as patch:
        patch.setattr(place, fail)
        with pytest.raises(error, match="from a test"):
            attach(model, offload=HALF)
    assert_unchanged(model, before)
    assert_same(model, right, X, 1)
    session = attach(model, offload=HALF)
    assert_same(model, right, X, 8)
    session.detach()
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    "place",
    [
        "blockswap.feasible.find_again",
        "blockswap.model_state._C.Engine",
        "blockswap.host.Host.__init__",
        "blockswap.fixed.FixedTensors.to_device",
        "blockswap.steward.Steward.start",
        "blockswap.hooks._Door.open",
    ],
)
def test_taking_a_changed_model_in_anew_may_fail_and_detaches_it(
    monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    model, right = make_pair()
    session = attach_ready(model, X, offload=HALF)
    for each in (model, right):
        each.add_module("unused", torch.nn.Linear(2, 2).requires_grad_(False))
    right.unused.load_state_dict(model.unused.state_dict())

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("from a test")

    with monkeypatch.context() as patch:
        patch.setattr(place, fail)
        with pytest.raises(OSError, match="from a test") as failure:
            model(X)
    if hasattr(failure.value, "__notes__"):  # Python 3.11
        assert "the session is detached" in failure.value.__notes__[0]
    assert session.state == "detached"
    assert_same(copy.deepcopy(model), right, X, 1)  # an ordinary model
    session = attach(model, offload="3MiB")
    assert_same(model, right, X, 4)
    session.detach()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("tick", [1])  # a quick machine ends before a later one
def test_ctrl_c_while_weights_move_leaves_every_parameter_whole(
    monkeypatch: pytest.MonkeyPatch, error: type[BaseException], tick: int
) -> None:
    model, right = make_pair()
    before = describe(model)
    done: list[int] = []

    class Interrupted:
        def __init__(self, *_: Any) -> None: ...

        def __enter__(self) -> Callable[[int], None]:
            return self.tick

        def __exit__(self, *_: object) -> None: ...

        def tick(self, num_bytes: int) -> None:
            done.append(num_bytes)
            if len(done) == tick:
                raise error("from a test")

    with monkeypatch.context() as patch:
        patch.setattr("blockswap.host.progress", Interrupted)
        patch.setattr("blockswap.host.CHUNK_BYTES", 2**20)
        with pytest.raises(error, match="from a test"):
            attach(model, offload=HALF)
    assert_unchanged(model, before)
    attach(model, offload=HALF)
    assert_same(model, right, X, 2)
