"""Input shapes that alternate, as prompts of two lengths do in each step of a pipeline."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

import blockswap
from blockswap import _C
from blockswap.learning import Stage
from blockswap.loan import Loan
from blockswap.placement import Placement
from blockswap.plans import Plans
from tests.accelerator.conftest import TOTAL
from tests.accelerator.test_cap import WIDTHS
from tests.accelerator.test_elastic import MARGIN, Bursting
from tests.accelerator.test_sessions import STEPS, Chain

pytestmark = pytest.mark.usefixtures("base")
MIB = 2**20
ROWS = (4, 6)
MANY_ROWS = 2048  # 4 MiB for each activation


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
    """A session of a model that shapes run through in turns."""

    def __init__(self, base: int) -> None:
        self.model = Chain(WIDTHS, seed=3)
        self.expected = {rows: self.model(inputs(rows)) for rows in (*ROWS, MANY_ROWS)}
        self.session = blockswap.attach(self.model, device="fake", vram=base + 36 * MIB, check=True)

    def learn(self, *shapes: int) -> None:
        for _ in range(2 * STEPS):
            self.step(*shapes)
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


@pytest.fixture
def learned(alternating: Alternating) -> Alternating:
    """Both shapes are known."""
    alternating.learn(*ROWS)
    return alternating


def installed(session: blockswap.Session) -> object:
    """Return the plan that is on the device."""
    return session._steward.plans.plan


def test_shapes_that_alternate_share_one_plan_and_move_no_resident(
    learned: Alternating, copies: list[int]
) -> None:
    plan = installed(learned.session)
    for _ in range(4):
        learned.step(*ROWS)
        assert installed(learned.session) is plan
    assert learned.session.report().resident_bytes > 0 and not copies


def test_a_shape_that_stays_gets_a_plan_of_its_own_once_it_has_lost_what_that_costs(
    learned: Alternating, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("blockswap.plans.Loan", lambda *_: Loan(1.0, lambda: 2.5))
    steward = learned.session._steward
    ((key, other),) = (
        (key, it) for key, it in steward._learned.items() if it is not steward.plans._owner
    )
    steward.plans.make(other)  # else both may have found that one plan is as good for either
    rows = next(rows for rows in ROWS if f"[{rows}, " in str(key))
    learned.step(*(its for its in ROWS if its != rows))
    plan = installed(learned.session)
    for _ in range(3):
        learned.step(rows)
        assert installed(learned.session) is plan
    learned.step(rows)
    assert installed(learned.session) is not plan


def test_while_shapes_that_alternate_learn_residents_are_copied_for_one_plan_at_a_time(
    alternating: Alternating, copies: list[int]
) -> None:
    learned = alternating.session._steward._learned
    stages = []
    for _ in range(2 * STEPS):
        for rows in ROWS:
            copies.clear()
            alternating.step(rows)
            both = [it.stage for it in learned.values()]
            stages.append((both, len(copies)))
    settling = [copied for both, copied in stages if both == [Stage.SETTLE, Stage.SETTLE]]
    assert len(settling) > 2 and sum(copied > 0 for copied in settling) <= 1, stages


def test_each_of_two_shapes_is_told_what_is_predicted_for_itself(learned: Alternating) -> None:
    """Whichever of them the plan was made for."""
    predicted = []
    for rows in ROWS * 2:
        learned.step(rows)
        assert learned.session.state == "ready"
        plans, it = learned.session._steward.plans, learned.session._steward.learned
        assert plans.request is it.request
        report = learned.session.report()
        _C.predict(plans.plan, it.request)
        assert report.predicted_ms == 1e3 * plans.plan.predicted_seconds
        predicted.append(report.predicted_ms)
    assert predicted[:2] == predicted[2:] and predicted[0] != predicted[1]


def test_a_step_of_another_shape_does_not_count_as_an_earlier_one_of_the_shape_that_settles(
    alternating: Alternating,
) -> None:
    known = alternating.session._steward._learned
    settling = 0
    for _ in range(2 * STEPS):
        for rows in ROWS:
            alternating.step(rows)
            settling += any(it.stage is Stage.SETTLE for it in known.values())
            assert all(it.earlier_times is None for it in known.values())
    assert settling


def test_a_shape_that_needs_more_than_the_other_leaves_never_runs_out_of_memory(
    alternating: Alternating,
) -> None:
    """Its plan is made in a step of the other shape, whose input is small."""
    for _ in range(2 * STEPS):
        for rows in (ROWS[0], MANY_ROWS):
            alternating.step(rows)
            report = alternating.session.report()
            assert report.ooms == 0 and report.peak_device_bytes <= report.cap_bytes
    assert report.state == "ready"


def test_a_shape_that_the_plan_of_the_other_leaves_too_little_has_its_own_installed(
    alternating: Alternating,
) -> None:
    for rows in (MANY_ROWS, ROWS[0]):
        for _ in range(2 * STEPS):
            alternating.step(rows)
    alternating.step(MANY_ROWS)
    report = alternating.session.report()
    assert report.state == "ready" and report.ooms == 0
    assert report.peak_device_bytes <= report.cap_bytes


class Shaped(Bursting):
    """What it does depends on the number of rows: memory for a moment, an order, another run."""

    def __init__(self, seed: int, width: int = 256, num_layers: int = 32) -> None:
        super().__init__([width] * (num_layers + 1), seed)
        self.apart.bursts, self.apart.orders = {}, {}
        self.apart.again = None  # a layer that runs once more at the end

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.shape[0]
        order = self.apart.orders.get(rows, range(len(self.layers)))
        for position, index in enumerate(order):
            x = self.layers[index](x)
            if position == len(self.layers) // 2 and x.device.type != "cpu":
                torch.empty(self.apart.bursts.get(rows, 0), dtype=torch.uint8, device=x.device)
        return x if self.apart.again is None else self.layers[self.apart.again](x)

    def take(self, rows: int) -> torch.Tensor:
        return torch.randn(rows, 256, generator=torch.Generator().manual_seed(rows))

    def steps(self, *shapes: int) -> None:
        for rows in shapes:
            self(self.take(rows).to("fake"))


@pytest.fixture
def installs(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Plans that are installed."""
    made: list[object] = []
    on_device = Plans._install
    monkeypatch.setattr(
        Plans, "_install", lambda it, plan, *rest: (made.append(plan), on_device(it, plan, *rest))
    )
    return made


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"block_size": "1MiB"}], ids=str)
def test_a_plan_is_made_anew_when_images_have_moved_for_a_shape_that_runs_in_another_order(
    accelerator: ModuleType, base: int, options: dict[str, object]
) -> None:
    model = Shaped(seed=4, num_layers=24)
    model.apart.orders = {6: [*range(10), 12, 10, 13, 11, *range(14, 24)]}
    expected = {rows: model(model.take(rows)) for rows in ROWS}
    with blockswap.attach(model, device="fake", vram=base + 5 * MIB, check=True, **options) as it:
        for rows in [4] * STEPS + [6] * STEPS + [4] * 4 + [6, 4] * 4:
            assert torch.equal(model(model.take(rows).to("fake")).cpu(), expected[rows])
        assert it.report().streamed_bytes > 0


@torch.no_grad()
def test_a_shape_that_settles_goes_on_under_its_own_plan_without_installing_it_again(
    accelerator: ModuleType, base: int, installs: list[object]
) -> None:
    model = Shaped(seed=5)
    with blockswap.attach(model, device="fake", vram=base + 7 * MIB, check=True) as session:
        known = session._steward._learned
        seen = []
        for _ in range(2 * STEPS):
            for rows in ROWS:
                installs.clear()
                model.steps(rows)
                seen += [(len(installs), [it.stage for it in known.values()])]
    settling = [num for num, stages in seen if stages == [Stage.SETTLE, Stage.SETTLE]]
    assert len(settling) > 4 and sum(num > 0 for num in settling) <= 2, seen


@torch.no_grad()
def test_a_shape_that_stays_under_anothers_plan_takes_room_that_comes_free(
    accelerator: ModuleType, base: int
) -> None:
    model = Shaped(seed=6)
    accelerator.set_copy_delay(4e-9, 1e-4)
    accelerator.set_others(TOTAL - MARGIN - 6 * MIB)
    with blockswap.attach(model, device="fake", check=True) as session:
        for _ in range(2 * STEPS):
            model.steps(*ROWS)
        accelerator.reset_delays()
        steward = session._steward
        owner = steward.plans._owner
        (rows,) = (
            rows
            for rows in ROWS
            if any(f"[{rows}, " in str(k) and it is not owner for k, it in steward._learned.items())
        )
        assert session.report().streamed_bytes > 0
        accelerator.set_others(0)
        model.steps(*[rows] * 4)
        assert session.report().streamed_bytes == 0


@torch.no_grad()
def test_a_plan_that_another_shape_lends_is_not_kept_where_it_leaves_too_little(
    accelerator: ModuleType, base: int
) -> None:
    model = Shaped(seed=7)
    accelerator.set_copy_delay(4e-9, 1e-4)
    model.apart.bursts = {4: 6 * MIB}
    others = TOTAL - MARGIN - 10 * MIB
    accelerator.set_others(others)
    with blockswap.attach(model, device="fake", check=True) as session:
        model.steps(*[4] * 2 * STEPS)
        while session._steward.learned.stage is not Stage.SETTLE:
            model.steps(*ROWS)
        model.steps(*ROWS)
        before = session.report().pool_bytes
        accelerator.set_others(others + accelerator.mem_get_info()[0] - MARGIN * 5 // 8)
        while session.state != "ready":
            model.steps(6)
        model.steps(6, 6)
        assert session.report().pool_bytes < before
        assert accelerator.mem_get_info()[0] >= MARGIN * 11 // 16


@torch.no_grad()
@pytest.mark.parametrize("between", ["vacate", "other"])
def test_a_layer_that_runs_again_is_no_other_order_whatever_came_between(
    accelerator: ModuleType, base: int, between: str
) -> None:
    model = Shaped(seed=8)
    model.apart.again = 0
    with blockswap.attach(model, device="fake", offload="1GB", check=True) as session:
        model.steps(*[4] * 2 * STEPS)
        assert session.state == "ready"
        if between == "vacate":
            session.vacate()
        for _ in range(STEPS):
            model.steps(*((4,) if between == "vacate" else ROWS))
        assert session.report().mispredicted > 0
        assert all(not it.relearned for it in session._steward._learned.values())
