"""A host held up while it learns, on the fake accelerator: no plan is spoiled by it."""

from __future__ import annotations

import time
from types import ModuleType, SimpleNamespace

import pytest
import torch

import blockswap
from blockswap.learning import SETTLING_STEPS_OF_HOST
from tests.accelerator.test_sessions import Chain


@pytest.fixture(autouse=True)
def settles_once() -> None:
    """In place of the fixture that keeps other tests from settling again: these do."""


@torch.no_grad()
@pytest.mark.parametrize("step", ["timed", "settling"])
def test_a_host_held_up_in_one_step_of_learning_spoils_no_plan(
    accelerator: ModuleType, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    monkeypatch.setattr("blockswap.learning.MOST_SETTLED", 1)  # and without settling again
    model = Chain([128] * 13, seed=0)
    x = torch.randn(4, 128, generator=torch.Generator().manual_seed(1)).to("fake")
    accelerator.set_body_delay(3e-3)
    held_up = {"timed": 2, "settling": 5}[step]  # the last step of the stage
    counted = SimpleNamespace(steps=0)

    def hold_up(*_: object) -> None:
        counted.steps += 1
        if counted.steps == held_up + 1:
            time.sleep(1.0)

    # Between two streamed leaves, with work enough behind it for the host to get ahead again.
    model.layers[2].register_forward_hook(hold_up)
    with blockswap.attach(model, device="fake", offload="250kB", block_size="64kB") as session:
        while session.state != "ready":
            model(x)
        assert counted.steps == 7  # it is ready when the next one begins
        assert 0.0 < (session.report().predicted_ms or 0.0) < 500.0


@torch.no_grad()
@pytest.mark.parametrize("held_up", [(4, 6), (4, 6, 7, 9)], ids=["once", "twice"])
def test_a_plan_is_settled_once_more_when_its_measured_steps_do_not_explain_the_other_one(
    accelerator: ModuleType, held_up: tuple[int, ...]
) -> None:
    model = Chain([128] * 13, seed=0)
    x = torch.randn(4, 128, generator=torch.Generator().manual_seed(1)).to("fake")
    accelerator.set_body_delay(3e-3)
    counted = SimpleNamespace(steps=0)

    def hold_up(*_: object) -> None:
        counted.steps += 1
        if counted.steps in held_up:
            time.sleep(0.4)

    model.layers[2].register_forward_hook(hold_up)
    with blockswap.attach(model, device="fake", offload="250kB", block_size="64kB") as session:
        while session.state != "ready":
            model(x)
        assert 0.0 < (session.report().predicted_ms or 0.0) < 300.0


@torch.no_grad()
def test_a_plan_that_is_smaller_when_it_returns_is_settled_from_the_beginning(
    accelerator: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("blockswap.learning.MOST_SETTLED", 1)  # not for any other reason
    total, small = 16 * 2**20, 3 * 2**20
    accelerator.set_limit(total)
    model = Chain([256] * 25, seed=0)
    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(1))
    expected = model(x)
    with blockswap.attach(model, device="fake", block_size="64kB", check=True) as session:
        for _ in range(5):
            assert torch.equal(model(x.to("fake")).cpu(), expected)
        assert session.state == "learning"
        before = session.report().pool_bytes
        session.vacate()
        accelerator.set_others(total - accelerator.memory_allocated() - small)
        num_steps = 0
        while session.state != "ready":
            assert torch.equal(model(x.to("fake")).cpu(), expected)
            num_steps += 1
        assert num_steps > SETTLING_STEPS_OF_HOST
        assert 0 < session.report().pool_bytes < before


@torch.no_grad()
@pytest.mark.parametrize(
    ("is_host", "cores", "is_on_thread"), [(True, 2, True), (True, 1, False), (False, 2, False)]
)
def test_a_thread_with_a_core_issues_copies_where_the_host_sets_the_pace(
    accelerator: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    is_host: bool,
    cores: int,
    is_on_thread: bool,
) -> None:
    monkeypatch.setattr("blockswap.steward.num_cores", lambda: cores)
    if is_host:  # whatever it takes
        monkeypatch.setattr("blockswap.learning.HOST_PACE_SHARE", 0.0)
    model = Chain([256] * 13, seed=0)
    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(1))
    expected = model(x)
    accelerator.set_body_delay(3e-3)
    with blockswap.attach(
        model, device="fake", offload="2MB", block_size="300kB", check=True
    ) as session:
        while session.state != "ready":
            assert torch.equal(model(x.to("fake")).cpu(), expected)
        engine = session._state.engine
        assert engine.issues_on_thread is is_on_thread
        accelerator.reset_delays()
        accelerator.set_random_delays(3, 2e-3)
        edited = Chain([256] * 13, seed=0)
        for each in (model, edited):
            each.layers[3][0].weight.data += 1
        for _ in range(20):
            assert torch.equal(model(x.to("fake")).cpu(), edited(x))
        assert session.report().copies_per_step > 3
