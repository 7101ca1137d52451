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
from tests.accelerator.test_elastic import Bursting, inputs, ready
from tests.accelerator.test_sessions import STEPS, Chain

MIB = 2**20
TOTAL = 128 * MIB
WIDTHS = [512] * 49  # 48 MiB, leaves of 1 MiB


class Drawing(Bursting):
    """Draws a random number, and counts its calls."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.apart.calls += 1
        return super().forward(x + torch.rand((), device=x.device))


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


def drawn(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(0)
    out: torch.Tensor = model(x)
    return out.cpu()


@pytest.fixture(autouse=True)
def base(accelerator: ModuleType) -> int:
    """What earlier tests still hold; the rest of the card is `TOTAL`."""
    held = int(accelerator.memory_allocated())
    accelerator.set_limit(held + TOTAL)
    return held


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
        threading.Thread(target=run, args=pair) for pair in zip(models, expected, strict=True)
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
