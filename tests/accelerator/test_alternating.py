"""Input shapes that alternate, as prompts of two lengths do in each step of a pipeline."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

import blockswap
from blockswap.loan import Loan
from blockswap.placement import Placement
from tests.accelerator.test_cap import WIDTHS
from tests.accelerator.test_sessions import STEPS, Chain

pytestmark = pytest.mark.usefixtures("base")
MIB = 2**20
ROWS = (4, 6)


def inputs(rows: int) -> torch.Tensor:
    return torch.randn(rows, WIDTHS[0], generator=torch.Generator().manual_seed(rows))


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Residents that are copied to the device."""
    copied: list[int] = []
    copy = Placement.copy
    monkeypatch.setattr(Placement, "copy", lambda p, leaf: (copied.append(leaf), copy(p, leaf)))
    return copied


class Alternating:
    """A session that knows two shapes."""

    def __init__(self, base: int) -> None:
        self.model = Chain(WIDTHS, seed=3)
        self.expected = {rows: self.model(inputs(rows)) for rows in ROWS}
        self.session = blockswap.attach(self.model, device="fake", vram=base + 24 * MIB, check=True)
        for _ in range(2 * STEPS):
            self.step(*ROWS)
        assert self.session.state == "ready"

    def step(self, *shapes: int) -> None:
        for rows in shapes:
            x = inputs(rows).to("fake")
            assert torch.equal(self.model(x).cpu(), self.expected[rows])


@pytest.fixture
def alternating(accelerator: ModuleType, base: int) -> Iterator[Alternating]:
    with torch.no_grad():
        both = Alternating(base)
        with both.session:
            yield both


def installed(session: blockswap.Session) -> object:
    """Return the plan that is on the device."""
    return session._steward.plans.plan


def test_shapes_that_alternate_share_one_plan_and_move_no_resident(
    alternating: Alternating, copies: list[int]
) -> None:
    plan = installed(alternating.session)
    for _ in range(4):
        alternating.step(*ROWS)
        assert installed(alternating.session) is plan
    assert alternating.session.report().resident_bytes > 0 and not copies


def test_a_shape_that_stays_gets_a_plan_of_its_own_once_it_has_lost_what_that_costs(
    alternating: Alternating, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("blockswap.plans.Loan", lambda *_: Loan(1.0, 2.5))
    owner = alternating.session._steward.plans._owner
    shapes = [key for key, it in alternating.session._steward._learned.items() if it is not owner]
    assert len(shapes) == 1
    rows = next(rows for rows in ROWS if f"[{rows}, " in str(shapes[0]))
    alternating.step(*(other for other in ROWS if other != rows))
    plan = installed(alternating.session)
    for _ in range(3):
        alternating.step(rows)
        assert installed(alternating.session) is plan
    alternating.step(rows)
    assert installed(alternating.session) is not plan
