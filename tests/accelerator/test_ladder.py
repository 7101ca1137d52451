"""Memory that is out in a forward gives up rung by rung, and the forward runs again."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from torch import nn

import blockswap
from tests.accelerator.conftest import TOTAL
from tests.accelerator.test_cap import WIDTHS, Drawing, drawn
from tests.accelerator.test_elastic import inputs, ready
from tests.accelerator.test_sessions import STEPS

pytestmark = pytest.mark.usefixtures("base")
MIB = 2**20


class Headed(Drawing):
    """Holds 16 MiB of weights outside its blocks."""

    def __init__(self, widths: list[int], seed: int) -> None:
        super().__init__(widths, seed)
        self.first = nn.Linear(8, 8, bias=False)  # never streams: the model's first parameter
        self._modules = {"first": self.first, **self._modules}
        self.heads = nn.ModuleDict({str(i): nn.Linear(512, 512, bias=False) for i in range(16)})
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = super().forward(x)
        for head in self.heads.values():
            x = x + head(x)
        return x


@torch.no_grad()
def test_a_burst_that_residents_leave_no_room_for_runs_again_without_them(
    accelerator: ModuleType,
) -> None:
    model = Drawing(WIDTHS, seed=4).eval()
    expected = drawn(model, inputs())
    with ready(model) as session:
        before = session.report().pool_bytes
        model.burst, model.apart.calls = TOTAL - before + MIB, 0
        assert torch.equal(drawn(model, inputs().to("fake")), expected)
        assert model.apart.calls == 2
        report = session.report()
        assert (report.ooms, report.ladder) == (1, {"shed": 1})
        for _ in range(STEPS):
            assert torch.equal(drawn(model, inputs().to("fake")), expected)
        report = session.report()
        assert (report.ooms, session.state) == (1, "ready")
        assert 0 < report.pool_bytes < before
        assert "1 shed" in str(report)


@torch.no_grad()
def test_the_first_step_of_a_tight_cap_runs_again_with_the_smallest_ring(
    accelerator: ModuleType,
    base: int,
) -> None:
    model = Drawing(WIDTHS, seed=5).eval()
    model.burst = 54 * MIB
    expected = drawn(model, inputs())
    with blockswap.attach(model, device="fake", vram=base + 60 * MIB, check=True) as session:
        for _ in range(STEPS):
            assert torch.equal(drawn(model, inputs().to("fake")), expected)
        report = session.report()
        assert report.ladder == {"ring": 1}
        assert report.peak_device_bytes is not None and report.peak_device_bytes <= base + 60 * MIB


@torch.no_grad()
def test_the_last_rung_streams_what_lies_outside_the_blocks(
    accelerator: ModuleType, base: int
) -> None:
    model = Headed(WIDTHS, seed=6).eval()
    model.burst = 30 * MIB
    expected = drawn(model, inputs())
    with blockswap.attach(model, device="fake", vram=base + 38 * MIB, check=True) as session:
        assert session.report().fixed_bytes > 15 * MIB
        for _ in range(STEPS):
            assert torch.equal(drawn(model, inputs().to("fake")), expected)
        report = session.report()
        assert report.ladder["layerwise"] == 1 and report.fixed_bytes < MIB
        assert report.peak_device_bytes is not None and report.peak_device_bytes <= base + 38 * MIB
    assert torch.equal(drawn(model, inputs()), expected)


@torch.no_grad()
def test_a_burst_beyond_any_plan_is_an_error_with_numbers_and_the_next_call_is_right(
    accelerator: ModuleType,
    base: int,
) -> None:
    model = Drawing(WIDTHS, seed=7).eval()
    expected = drawn(model, inputs())
    with ready(model, vram=base + 32 * MIB) as session:
        model.burst = 33 * MIB
        with pytest.raises(torch.OutOfMemoryError) as raised:
            model(inputs().to("fake"))
        if sys.version_info >= (3, 11):
            assert "1.0 MiB for its smallest ring" in raised.value.__notes__[-1]
            assert "raise vram" in raised.value.__notes__[-1]
        model.burst = 0
        for _ in range(STEPS):
            assert torch.equal(drawn(model, inputs().to("fake")), expected)
        assert session.state == "ready"


@torch.no_grad()
def test_a_forward_that_cannot_be_repeated_fails_and_the_next_one_succeeds(
    accelerator: ModuleType,
) -> None:
    model = Drawing(WIDTHS, seed=8).eval()
    expected = drawn(model, inputs())
    with ready(model) as session:
        model.burst, model.apart.calls = TOTAL - session.report().pool_bytes + MIB, 0
        with torch.inference_mode():
            x = inputs().to("fake")  # nobody counts what is written to it
        with pytest.raises(torch.OutOfMemoryError) as raised:
            model(x)
        assert model.apart.calls == 1
        if sys.version_info >= (3, 11):
            assert "call again" in raised.value.__notes__[-1]
        assert torch.equal(drawn(model, inputs().to("fake")), expected)


@torch.no_grad()
def test_pressure_walks_the_rungs_in_their_order_within_one_forward(
    accelerator: ModuleType, base: int, caplog: pytest.LogCaptureFixture
) -> None:
    model = Headed(WIDTHS, seed=10).eval()
    expected = drawn(model, inputs())
    with ready(model, vram=base + 60 * MIB) as session:
        assert session.report().resident_bytes > 20 * MIB
        model.burst, model.apart.calls = 50 * MIB, 0
        caplog.clear()
        assert torch.equal(drawn(model, inputs().to("fake")), expected)
        assert model.apart.calls == 4
        assert session.report().ladder == {"shed": 1, "ring": 1, "layerwise": 1}
        told = [r.getMessage() for r in caplog.records if "out of memory" in r.getMessage()]
        for line, word in zip(
            told, ("its residents", "its ring", "outside the blocks"), strict=True
        ):
            assert word in line
        for _ in range(STEPS):
            assert torch.equal(drawn(model, inputs().to("fake")), expected)
        report = session.report()
        assert (report.ooms, session.state) == (3, "ready")
        assert report.peak_device_bytes is not None and report.peak_device_bytes <= base + 60 * MIB
