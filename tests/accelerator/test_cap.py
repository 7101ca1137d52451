"""A cap holds for what PyTorch reserves, too, and memory that is out gives up rung by rung."""

from __future__ import annotations

import contextlib
import sys
import threading
from types import ModuleType

import pytest
import torch
from torch import nn

import blockswap
from blockswap.errors import CapError
from blockswap.profile import Profile
from tests.accelerator.conftest import TOTAL
from tests.accelerator.test_elastic import Bursting, inputs, ready
from tests.accelerator.test_sessions import STEPS, Chain

pytestmark = pytest.mark.usefixtures("base")
MIB = 2**20
WIDTHS = [512] * 49  # 48 MiB, leaves of 1 MiB


class Drawing(Bursting):
    """Draws a random number, and counts its calls."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.apart.calls += 1
        return super().forward(x + torch.rand((), device=x.device))


def drawn(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(0)
    out: torch.Tensor = model(x)
    return out.cpu()


@torch.no_grad()
@pytest.mark.parametrize("cap_mib", [12, 16, 24, 36, 52, 60])
def test_the_peak_stays_below_every_cap(accelerator: ModuleType, base: int, cap_mib: int) -> None:
    model = Drawing(WIDTHS, seed=1).eval()
    model.burst = 6 * MIB
    expected = drawn(model, inputs())
    with blockswap.attach(model, device="fake", check=True, vram=base + cap_mib * MIB) as session:
        for _ in range(STEPS):
            assert torch.equal(drawn(model, inputs().to("fake")), expected)
        report = session.report()
        assert (
            report.peak_device_bytes is not None
            and report.peak_device_bytes <= base + cap_mib * MIB
        )
        assert (report.ooms, report.sheds, session.state) == (0, 0, "ready")
        assert report.pool_bytes >= min(48, cap_mib - 13) * MIB


@torch.no_grad()
def test_pytorch_is_limited_in_a_forward_and_free_again_behind_it(
    accelerator: ModuleType, base: int
) -> None:
    accelerator.set_per_process_memory_fraction(0.75)
    model = Chain(WIDTHS, seed=2)
    seen = []
    model.layers[3].register_forward_hook(
        lambda *_: seen.append(accelerator.get_per_process_memory_fraction())
    )
    with ready(model, vram=base + 32 * MIB) as session:
        assert seen and all(share == (base + 32 * MIB) / (base + TOTAL) for share in seen)
        assert accelerator.get_per_process_memory_fraction() == 0.75
        with pytest.raises(RuntimeError, match="mat1 and mat2"):
            model(torch.zeros(1, 3, device="fake"))
        assert accelerator.get_per_process_memory_fraction() == 0.75
        beside = torch.empty(
            90 * MIB - session.report().pool_bytes, device="fake", dtype=torch.int8
        )
        del beside
    accelerator.set_per_process_memory_fraction(1.0)


@torch.no_grad()
def test_residents_make_way_for_what_the_script_keeps_and_come_back(
    accelerator: ModuleType,
    base: int,
) -> None:
    model = Chain(WIDTHS, seed=3)
    expected = model(inputs())
    with ready(model, vram=base + 32 * MIB) as session:
        before = session.report().pool_bytes
        kept = torch.empty(10 * MIB, dtype=torch.int8, device="fake")
        for _ in range(2):
            assert torch.equal(model(inputs().to("fake")).cpu(), expected)
        report = session.report()
        assert (report.sheds, report.ooms) == (1, 0)
        assert report.pool_bytes < min(before, 21 * MIB)
        assert accelerator.memory_allocated() <= base + 32 * MIB
        del kept
        for _ in range(4):
            assert torch.equal(model(inputs().to("fake")).cpu(), expected)
        report = session.report()
        assert report.growths == 1 and report.pool_bytes > 21 * MIB


@torch.no_grad()
def test_what_fits_runs_however_tight_and_what_does_not_names_the_way_out(
    accelerator: ModuleType,
    base: int,
) -> None:
    model = Drawing(WIDTHS, seed=9).eval()
    expected = drawn(model, inputs())
    model.burst = 28 * MIB
    with blockswap.attach(model, device="fake", vram=base + 30 * MIB) as session:
        for _ in range(2 * STEPS):
            assert torch.equal(drawn(model, inputs().to("fake")), expected)
        assert session.state == "ready"
        model.burst = 29 * MIB
        with pytest.raises(torch.OutOfMemoryError) as raised:
            model(inputs().to("fake"))
        if sys.version_info >= (3, 11):
            assert "raise vram" in raised.value.__notes__[-1]
        model.burst = 0
        assert torch.equal(drawn(model, inputs().to("fake")), expected)
        assert session.report().peak_device_bytes <= base + 30 * MIB  # type: ignore[operator]


@torch.no_grad()
def test_capped_sessions_in_two_threads_leave_no_limit_behind(
    accelerator: ModuleType, base: int
) -> None:
    models = [Chain([256] * 9, seed=s) for s in (20, 21)]
    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(1))
    expected = [model(x) for model in models]
    sessions = [blockswap.attach(model, device="fake", vram=base + 6 * MIB) for model in models]
    wrong: list[torch.Tensor] = []

    def run(model: Chain, right: torch.Tensor) -> None:
        with torch.no_grad():
            outputs = [model(x.to("fake")).cpu() for _ in range(STEPS)]
            wrong.extend(output for output in outputs if not torch.equal(output, right))

    threads = [
        threading.Thread(target=run, args=pair, daemon=True)
        for pair in zip(models, expected, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert accelerator.get_per_process_memory_fraction() == 1.0
    for session in sessions:
        session.detach()


@torch.no_grad()
@pytest.mark.parametrize("stays", ["layers.0", "layers.47"])
def test_priorities_say_what_is_shed_first(accelerator: ModuleType, base: int, stays: str) -> None:
    model = Chain(WIDTHS, seed=11)
    order = [f"layers.{i}" for i in range(48)]
    order = order if stays == "layers.0" else order[::-1]
    priorities = {name: len(order) - place for place, name in enumerate(order)}
    with ready(model, vram=base + 40 * MIB, priorities=priorities) as session:

        def resident() -> set[str]:
            leaves = [unit for unit in session._state.units.values() if unit.plan_piece >= 0]
            return {unit.name.rsplit(".", 1)[0] for unit in leaves if unit.piece < 0}

        before = resident()
        kept = torch.empty(20 * MIB, dtype=torch.int8, device="fake")
        model(inputs().to("fake"))
        after = resident()
        del kept
        assert session.report().sheds == 1 and after < before
        assert after == set(order[: len(after)]), "what matters least went first"


@torch.no_grad()
def test_memory_that_pytorch_could_do_without_is_told(accelerator: ModuleType, base: int) -> None:
    model = Chain(WIDTHS, seed=12)
    asked = [TOTAL]

    def try_workspace(*_: object) -> None:
        with contextlib.suppress(torch.OutOfMemoryError):  # as cuDNN's callers do
            torch.empty(asked[0], dtype=torch.int8, device="fake")

    model.layers[3].register_forward_hook(try_workspace)
    with ready(model, vram=base + 32 * MIB) as session:
        notes = [note for note in session.report().notes if "other last bits" in note]
        assert len(notes) == 1 and session.report().ooms == 0
    asked[0] = 1
    with ready(model, vram=base + 32 * MIB) as session:
        assert not any("other last bits" in note for note in session.report().notes)


@torch.no_grad()
def test_a_profile_plans_with_the_bytes_that_the_session_has_under_the_same_cap(
    accelerator: ModuleType, base: int
) -> None:
    model = Drawing(WIDTHS, seed=9).eval()
    model.burst = 6 * MIB
    with ready(model, vram=base + 30 * MIB) as session:
        profile, granted = Profile.of(session), session._steward.learned.granted
    _, request = profile.plan(base + 30 * MIB)
    # Inputs and the output, which PyTorch holds while it looks.
    assert granted.cap is not None and abs(request.budget_bytes - granted.cap) < 2**14


@torch.no_grad()
def test_a_later_input_that_leaves_too_little_for_the_options_streams_and_says_so(
    base: int,
) -> None:
    model = Drawing(WIDTHS, seed=4).eval()
    model.burst = 2 * MIB
    larger = torch.cat([inputs(), inputs()])
    expected = drawn(model, larger)
    session = ready(model, vram=base + 40 * MIB, swap_space="8MiB")
    model.burst = 32 * MIB
    for _ in range(STEPS):
        assert torch.equal(drawn(model, larger.to("fake")), expected)
        assert (session.report().peak_device_bytes or 0) <= base + 40 * MIB
    assert any(note.startswith("all streams: the cap leaves") for note in session.report().notes)
    session.detach()


@torch.no_grad()
def test_options_that_no_input_leaves_room_for_are_refused_by_every_forward(base: int) -> None:
    model = Chain(WIDTHS, seed=5)
    session = blockswap.attach(
        model, device="fake", vram=base + 24 * MIB, priorities={"layers.*": "pin"}
    )
    x = inputs().to("fake")

    def refusal() -> str:
        try:
            model(x)
        except CapError as error:
            return str(error)
        return ""

    said = [text for text in (refusal() for _ in range(STEPS)) if text]
    assert len(said) >= STEPS - 4 and len(set(said)) == 1
    session.vacate()  # as ever
    assert session.report().pool_bytes <= MIB
    session.detach()
