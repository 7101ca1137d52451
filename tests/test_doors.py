"""The forward in front of a module's own: other tools may have one too, before and after ours."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from session_models import assert_same, attach, make_input, make_pair
from torch import nn

from blockswap.errors import UseError

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


def test_a_model_called_while_an_exception_is_handled_learns_all_the_same() -> None:
    model, right = make_pair()
    session = attach(model, offload="1GB")
    try:
        raise RuntimeError("the caller's own")
    except RuntimeError:
        assert_same(model, right, X, 9)
    assert session.state == "ready"
    session.detach()


def test_a_block_called_alone_teaches_nothing() -> None:
    (model, right), (control, _) = make_pair(), make_pair()
    with (
        torch.no_grad(),
        attach(model, offload="1GB") as session,
        attach(control, offload="1GB") as quiet,
    ):
        for _ in range(9):
            control(X)
            model(X)
            seen, expected = session._steward.learned, quiet._steward.learned
            assert (seen.stage, seen.steps) == (expected.stage, expected.steps)
            model.blocks[1](X)
        assert session.state == "ready"
        assert {count for _, count in seen.runs.values()} == {1}
        assert_same(model, right, X)


def test_a_class_exchanged_after_attach_counts() -> None:
    model, right = make_pair()

    class Doubled(type(model.blocks[2])):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    with attach(model, offload="1GB"):
        model(X)
        for each in (model, right):
            each.blocks[2].__class__ = Doubled
        assert_same(model, right, X, 9)


def test_a_start_that_failed_leaves_the_gate_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, right = make_pair()
    with attach(model, offload="1GB") as session:
        model(X)
        monkeypatch.setattr(session._state, "begin_step", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(X)
        monkeypatch.undo()
        assert session.gate.root is None
        assert torch.equal(model.blocks[1](X), right.blocks[1](X))
        assert_same(model, right, X)


def test_pausing_inside_a_forward_that_was_called_directly_is_refused() -> None:
    model, right = make_pair()
    refused: list[str] = []

    def pause(*_: object) -> None:
        with pytest.raises(UseError, match="a forward runs"):
            session.pause()
        refused.append("yes")

    with attach(model, offload="1GB") as session:
        handle = model.blocks[1].register_forward_pre_hook(pause)
        assert torch.equal(model.forward(X), right(X))
        handle.remove()
    assert refused == ["yes"]


def test_the_forwards_own_error_is_the_one_that_is_raised() -> None:
    model, right = make_pair()

    def spoil(*_: object) -> None:
        model.blocks[0].up.weight.data.add_(1)  # an edit during a forward is an error, too
        raise torch.OutOfMemoryError("from a test")

    with attach(model, offload="1GB"):
        handle = model.blocks[3].register_forward_pre_hook(spoil)
        with pytest.raises(torch.OutOfMemoryError):
            model(X)
        handle.remove()
    assert right is not model


def test_a_users_forward_hook_on_a_leaf_reads_weights_through_a_reference_taken_earlier() -> None:
    model, right = make_pair()
    for each in (model, right):
        for block in each.blocks:
            weight = block.up.weight

            def hook(_: nn.Module, given: Any, output: Any, weight: Any = weight) -> torch.Tensor:
                added: torch.Tensor = output + nn.functional.linear(given[0], weight)
                return added

            block.up.register_forward_hook(hook)
    with attach(model, offload="1GB", check=True):
        assert_same(model, right, X, 12)
