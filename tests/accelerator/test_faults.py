"""Memory is out at any one allocation: an error that says so, or the right result, and nothing is left."""

from __future__ import annotations

import gc
import random
from types import ModuleType

import pytest
import torch

import blockswap
from blockswap.errors import BlockswapError
from tests.accelerator.test_sessions import Chain

MIB = 2**20
STEPS = 9
RUNS_PER_SEED = 25
WIDTHS = [256] * 5  # 1 MiB
OPTIONS = [{"offload": "512KiB"}, {"vram": "4MiB"}, {}, {"mode": "layerwise"}]


class Run:
    """A model that is attached, runs, and is detached."""

    def __init__(self, seed: int) -> None:
        self.model = Chain(WIDTHS, seed).eval()
        self.x = torch.randn(4, 256, generator=torch.Generator().manual_seed(seed))
        self.expected = self.model(self.x)
        self.wrong = 0

    def go(self, options: dict[str, object]) -> None:
        with blockswap.attach(self.model, device="fake", check=True, **options):
            for _ in range(STEPS):
                self.step()

    def step(self) -> None:
        self.wrong += not torch.equal(self.model(self.x.to("fake")).cpu(), self.expected)


def held(accelerator: ModuleType) -> int:
    gc.collect()
    accelerator.synchronize()
    return int(accelerator.memory_allocated())


@torch.no_grad()
@pytest.mark.parametrize("seed", range(8))
def test_one_allocation_that_fails_anywhere_ends_in_an_error_or_in_the_right_result(
    accelerator: ModuleType, seed: int
) -> None:
    draw = random.Random(seed)
    run = Run(seed)
    before, late_writes = held(accelerator), accelerator.writes_after_free()
    options = OPTIONS[seed % len(OPTIONS)]
    if "vram" in options:
        options = {"vram": before + 4 * MIB}  # earlier tests may hold something
    begin = accelerator.num_allocations()
    run.go(options)
    total = accelerator.num_allocations() - begin
    assert total > 100 and held(accelerator) == before
    errors = []
    for _ in range(RUNS_PER_SEED):
        accelerator.fail_allocation(draw.randrange(total))
        try:
            run.go(options)
        except (torch.OutOfMemoryError, BlockswapError, RuntimeError) as error:
            errors.append(str(error))
        accelerator.fail_allocation(None)
        assert held(accelerator) == before, "something is still on the device"
        assert torch.equal(run.model(run.x), run.expected), "the model is not what it was"
    assert run.wrong == 0
    assert all("out of memory" in error for error in errors), errors
    assert len(errors) < RUNS_PER_SEED, "the ladder should save some"
    assert accelerator.writes_after_free() == late_writes


@torch.no_grad()
def test_a_session_goes_on_after_every_allocation_of_a_step_has_failed_once(
    accelerator: ModuleType,
) -> None:
    run = Run(seed=100)
    with blockswap.attach(run.model, device="fake", check=True, offload="512KiB") as session:
        for _ in range(STEPS):
            run.step()
        begin = accelerator.num_allocations()
        run.step()
        per_step = accelerator.num_allocations() - begin
        assert per_step > 10
        failed = 0
        for after in range(per_step):
            accelerator.fail_allocation(after)
            try:
                run.step()
            except torch.OutOfMemoryError:
                failed += 1
            accelerator.fail_allocation(None)
            for _ in range(STEPS):
                run.step()
            assert session.state == "ready"
        assert run.wrong == 0
        assert failed <= 1, "only the test's own input may miss the ladder"
        assert session.report().ladder == {"shed": per_step - failed}
