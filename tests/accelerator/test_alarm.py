"""Memory that a library could do without is found, where something of ours can make way for it."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace

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


class Convolved(nn.Module):
    """Wants a workspace, as cuDNN does, and computes otherwise where there is none."""

    def __init__(self, inner: nn.Module, accelerator: ModuleType, wanted: int) -> None:
        super().__init__()
        self.inner = inner
        # What a script sets between calls is not the model's own.
        self.workspace = SimpleNamespace(bytes=wanted, found=accelerator.try_workspace)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inner(x)
        if x.device.type != "fake" or not self.workspace.bytes:
            return x * 2
        return x * 2 if self.workspace.found(self.workspace.bytes) else x * 2.5


@torch.no_grad()
def test_residents_make_way_for_a_workspace_and_the_forward_runs_again(
    accelerator: ModuleType,
) -> None:
    model = Convolved(Drawing(WIDTHS, seed=4), accelerator, 0).eval()
    expected = drawn(model, inputs())
    with ready(model) as session:
        model.workspace.bytes = TOTAL - session.report().pool_bytes + MIB
        for _ in range(STEPS):
            assert torch.equal(drawn(model, inputs().to("fake")), expected)
        report = session.report()
        assert (report.ooms, report.ladder) == (1, {"shed": 1})
        assert not any("algorithm" in note for note in report.notes)


@torch.no_grad()
def test_a_workspace_that_no_plan_leaves_room_for_is_done_without_and_told(
    accelerator: ModuleType, base: int
) -> None:
    model = Convolved(Drawing(WIDTHS, seed=5), accelerator, 33 * MIB).eval()
    with blockswap.attach(model, device="fake", vram=base + 32 * MIB, check=True) as session:
        for _ in range(STEPS):
            model(inputs().to("fake"))
        report = session.report()
    assert any("other last bits" in note for note in report.notes)


@torch.no_grad()
def test_a_forward_that_cannot_run_again_does_without_a_workspace(accelerator: ModuleType) -> None:
    model = Convolved(Drawing(WIDTHS, seed=6), accelerator, 0).eval()
    with ready(model) as session:
        model.workspace.bytes = TOTAL - session.report().pool_bytes + MIB
        with torch.inference_mode():
            x = inputs().to("fake")  # nobody counts what is written to it
        model(x)
        assert session.report().ooms == 0


@torch.no_grad()
def test_what_is_swallowed_outside_of_our_forwards_is_not_ours(accelerator: ModuleType) -> None:
    model = Drawing(WIDTHS, seed=7).eval()
    with ready(model):
        assert not accelerator.try_workspace(TOTAL + MIB)
        assert accelerator.try_workspace(MIB)


class Counting(Convolved):
    """Keeps a tensor from call to call that is no buffer."""

    def __init__(self, inner: nn.Module, accelerator: ModuleType, wanted: int) -> None:
        super().__init__(inner, accelerator, wanted)
        self.calls = torch.zeros(())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls = self.calls + 1
        return super().forward(x)


@torch.no_grad()
def test_a_model_that_counts_its_calls_in_a_tensor_is_not_run_again(
    accelerator: ModuleType,
) -> None:
    model = Counting(Drawing(WIDTHS, seed=8), accelerator, 0).eval()
    with ready(model) as session:
        before = int(model.calls)
        model.workspace.bytes = TOTAL - session.report().pool_bytes + MIB
        model(inputs().to("fake"))
        assert int(model.calls) == before + 1
