"""A session from attach to detach: what fails, interrupts or changes underway leaves no trace."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
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
    make_ready,
    make_stack,
    steps,
)

from blockswap.errors import UseError

X = make_input()
HALF = "4MiB"
ALL = "1GB"  # everything streams
FAILURES: list[type[BaseException]] = [RuntimeError, KeyboardInterrupt, SystemExit]


def once(error: type[BaseException]) -> Callable[..., None]:
    """Return a hook that raises the first time."""
    pending = [error("from a test")]

    def hook(*_: Any) -> None:
        if pending:
            raise pending.pop()

    return hook


# Attach, pause, resume, detach -------------------------------------------------------------------


@pytest.mark.parametrize("offload", [0, HALF, ALL])
@pytest.mark.parametrize("num_steps", [0, 1, 9])
def test_detach_restores_the_model_attribute_by_attribute(
    offload: int | str, num_steps: int
) -> None:
    model, right = make_pair()
    model.blocks[1].up.requires_grad_(True)
    before = describe(model)
    session = attach(model, offload=offload)
    steps(model, X, num_steps)
    session.detach()
    assert session.state == "detached"
    assert_unchanged(model, before)
    session.detach()
    assert_unchanged(model, before)
    assert_same(model, right, X, 1)


def test_pause_gives_ordinary_weights_back_and_resume_streams_again() -> None:
    model, right = make_pair()
    before = describe(model)
    session = attach_ready(model, X, offload=HALF)
    for _ in range(2):
        session.pause()
        assert session.state == "paused"
        assert_unchanged(model, before)
        assert_same(model, right, X, 1)
        assert_same(copy.deepcopy(model), right, X, 1)
        for each in (model, right):
            each.blocks[0].up.weight.data += 0.01
        before = describe(model)
        session.resume()
        assert session.state == "learning"
        assert_same(model, right, X, 8)
        assert session.state == "ready"


def test_detached_session_cannot_resume() -> None:
    session = attach(make_stack())
    session.detach()
    with pytest.raises(UseError, match=r"detached.*blockswap\.attach again"):
        session.resume()


def test_session_as_context_detaches() -> None:
    model = make_stack()
    before = describe(model)
    with attach(model, offload=2) as session:
        steps(model, X)
    assert session.state == "detached"
    assert_unchanged(model, before)


def test_attaching_again_with_the_same_settings_returns_the_live_session() -> None:
    model, right = make_pair()
    session = attach(model, offload=HALF)
    assert attach(model, offload=HALF) is session
    session.pause()
    assert attach(model, offload=HALF) is session
    assert session.state == "learning"
    assert_same(model, right, X)


def test_attaching_again_with_other_settings_is_refused_by_name() -> None:
    model, right = make_pair()
    session = attach(model, offload=HALF)
    with pytest.raises(UseError, match=r"\(offload, block_size differ\).*session\.detach\(\)"):
        attach(model, offload=2, block_size="1MiB")
    assert_same(model, right, X, 1)
    session.detach()
    assert attach(model, offload=2).state == "learning"


def test_model_and_session_die_when_nobody_uses_them() -> None:
    model = make_stack()
    session = attach_ready(model, X, offload=HALF)
    parameter = model.blocks[3].up.weight
    values = parameter.clone()
    dead = [weakref.ref(model), weakref.ref(session), weakref.ref(model.blocks[2].up)]
    del model, session
    gc.collect()
    assert [ref() for ref in dead] == [None, None, None]
    assert torch.equal(parameter, values), "a parameter that lives on lost its bytes"


def test_vacated_session_holds_no_device_memory_and_goes_on_right() -> None:
    model, right = make_pair()
    session = attach(model, offload=HALF)
    for _ in range(12):  # through all stages of learning
        session.vacate()
        assert session.report().pool_bytes == 0
        assert_same(model, right, X, 2)
    assert session.state == "ready"
    session.vacate()
    assert session.state == "ready"
    x = torch.randn(3, model.blocks[2].up.in_features)
    assert torch.equal(steps(model.blocks[2], x)[0], steps(right.blocks[2], x)[0])
    assert_same(model, right, X, 2)


def test_session_gives_back_what_is_asked_for_and_goes_on_right() -> None:
    model, right = make_pair()
    session = attach(model, offload=HALF)
    for asked in (1, 1, 1, *range(0, 2**22, 2**18)):  # through all stages of learning
        held = session.report().pool_bytes
        session.vacate(asked)
        left = session.report().pool_bytes
        assert left <= max(0, held - asked)
        assert_same(model, right, X, 2)
    assert session.state == "ready"
    held = session.report().pool_bytes
    session.vacate(held // 2)
    assert 0 < session.report().pool_bytes <= held - held // 2
    x = torch.randn(3, model.blocks[2].up.in_features)
    assert torch.equal(steps(model.blocks[2], x)[0], steps(right.blocks[2], x)[0])
    assert_same(model, right, X, 2)
    session.vacate(1)
    session.detach()
    assert_same(model, right, X, 1)


@pytest.mark.parametrize("asked", [None, 1])
def test_edit_while_vacated_is_used_by_the_next_forward(asked: int | None) -> None:
    model, right = make_pair()
    session = attach_ready(model, X, offload=HALF)
    session.vacate(asked)
    for each in (model, right):
        with torch.no_grad():
            each.blocks[1].up.weight.mul_(2)
            each.blocks[3].norm.weight.data += 1
    assert_same(model, right, X, 2)
    session.vacate(asked)
    session.detach()
    assert_same(model, right, X, 1)


def test_report_of_each_state_can_be_printed() -> None:
    model = make_stack()
    session = attach(model, offload=HALF)
    for act in (lambda: None, lambda: make_ready(session, X), session.pause, session.detach):
        act()
        report = session.report()
        assert report.state == session.state
        assert session.state in str(report)
        report.to_json()


# Failures ----------------------------------------------------------------------------------------


@pytest.fixture(params=["learning", "ready"])
def streaming(request: pytest.FixtureRequest) -> Iterator[tuple[Stack, Stack]]:
    """A model of which all streams, and what is right."""
    model, right = make_pair()
    attached = attach if request.param == "learning" else lambda m, **o: attach_ready(m, X, **o)
    session = attached(model, offload=ALL)
    yield model, right
    assert bits_of(model) == bits_of(right)
    assert_same(model, right, X, 1)
    session.detach()
    assert bits_of(model) == bits_of(right)


@pytest.mark.parametrize("error", FAILURES)
@pytest.mark.parametrize("where", ["blocks.2.mix", "blocks.3", "blocks.5.norm", "out"])
def test_failure_inside_a_forward_leaves_the_next_one_right(
    streaming: tuple[Stack, Stack], error: type[BaseException], where: str
) -> None:
    model, right = streaming
    handle = model.get_submodule(where).register_forward_pre_hook(once(error))
    with pytest.raises(error):
        steps(model, X)
    handle.remove()
    assert bits_of(model) == bits_of(right)
    assert_same(model, right, X, 9)


@pytest.mark.parametrize("error", FAILURES)
@pytest.mark.parametrize("alone", ["blocks.2", "blocks.2.up"])
def test_failure_in_a_part_called_alone_leaves_weights_real_and_the_next_forward_right(
    streaming: tuple[Stack, Stack], error: type[BaseException], alone: str
) -> None:
    model, right = streaming
    leaf = model.blocks[2].up
    handle = leaf.register_forward_pre_hook(once(error))
    with pytest.raises(error), torch.no_grad():
        model.get_submodule(alone)(X)
    handle.remove()
    assert bits_of(model) == bits_of(right)
    assert_same(model, right, X, 2)


def test_wrong_input_to_a_leaf_called_alone_leaves_weights_real(
    streaming: tuple[Stack, Stack],
) -> None:
    model, right = streaming
    with pytest.raises(RuntimeError, match="shapes"), torch.no_grad():
        model.blocks[2].up(torch.zeros(2, 3))
    assert bits_of(model) == bits_of(right)
    assert_same(model, right, X, 2)


def test_a_detached_session_keeps_no_memory_of_the_host() -> None:
    model, _ = make_pair()
    session = attach_ready(model, X, offload=HALF)
    arena = weakref.ref(session._state.host.arena)
    binding = weakref.ref(session._state.binding)
    session.detach()
    for parameter in model.parameters():
        parameter.data = torch.zeros(1)  # the weights went elsewhere
    gc.collect()
    assert arena() is None and binding() is None
    assert session.report().host_bytes == 0
