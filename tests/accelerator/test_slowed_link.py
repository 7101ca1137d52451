"""When learning slows the link, and that it never stays slow."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import pytest
import torch
from torch import nn

import blockswap
from blockswap.link import Link

WIDTH = 128
SLOWER = 3.0
RING = f"{2 * 4 * WIDTH * (WIDTH + 1)}B"  # two leaves


def factors_of(
    monkeypatch: pytest.MonkeyPatch, device: str, needed: float, rows: Sequence[int]
) -> list[float]:
    """How slow the link is during each forward of inputs with so many rows."""
    monkeypatch.setattr("blockswap.link.needed_slowdown", lambda *_: needed)
    now = [1.0]
    slow_down = Link.slow_down

    def note(link: Link, factor: float) -> None:
        now[0] = factor
        slow_down(link, factor)

    monkeypatch.setattr(Link, "slow_down", note)
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(6)]).requires_grad_(False)
    during: list[float] = []
    model[0].register_forward_hook(lambda *_: during.append(now[0]))
    with torch.no_grad():
        expected = {n: model(torch.ones(n, WIDTH)) for n in rows}
        during.clear()
        with blockswap.attach(model, device=device, offload="1GB", swap_space=RING):
            for n in rows:
                output = model(torch.ones(n, WIDTH, device=device))
                assert torch.equal(output.cpu(), expected[n])
    return during


def test_only_the_second_timed_step_runs_on_a_slower_link(
    accelerator: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    traced_and_timed, rest = [1.0, 1.0, SLOWER], [1.0] * 6
    assert factors_of(monkeypatch, "fake", SLOWER, [2] * 9) == traced_and_timed + rest


def test_another_input_shape_does_not_run_on_the_link_that_learning_slowed(
    accelerator: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert factors_of(monkeypatch, "fake", SLOWER, [2, 2, 3]) == [1.0] * 3


def test_a_cpu_which_is_its_own_device_is_never_slowed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert factors_of(monkeypatch, "cpu", SLOWER, [2] * 9) == [1.0] * 9
