"""Without a cap a session follows what other programs leave, and gives memory back when it is out."""

from __future__ import annotations

import gc
from types import ModuleType, SimpleNamespace

import pytest
import torch

import blockswap
from blockswap.errors import CapError, DeviceError
from blockswap.plans import Plans
from blockswap.room import GROW_AFTER, HOLD_OFF_STEPS, margin_bytes
from tests.accelerator.test_sessions import STEPS, Chain

MIB = 2**20
TOTAL = 128 * MIB
MARGIN = margin_bytes(TOTAL)
WIDTHS = [512] * 49  # 48 MiB


class Bursting(Chain):
    """Takes `burst` bytes for a moment, in the middle of its forward.

    What a test sets and counts lies apart: a model that keeps count is not run again.
    """

    def __init__(self, widths: list[int], seed: int) -> None:
        super().__init__(widths, seed)
        self.apart = SimpleNamespace(burst=0, calls=0)

    @property
    def burst(self) -> int:
        return int(self.apart.burst)

    @burst.setter
    def burst(self, num_bytes: int) -> None:
        self.apart.burst = num_bytes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for index, layer in enumerate(self.layers):
            x = layer(x)
            if index == len(self.layers) // 2 and self.burst:
                torch.empty(self.burst, dtype=torch.uint8, device=x.device)
        return x


def inputs() -> torch.Tensor:
    return torch.randn(4, WIDTHS[0], generator=torch.Generator().manual_seed(1))


def ready(model: Chain, **options: object) -> blockswap.Session:
    session = blockswap.attach(model, device="fake", check=True, **options)
    for _ in range(2 * STEPS):
        model(inputs().to("fake"))
        if session.state == "ready":
            return session
    raise AssertionError("not ready")


@pytest.fixture(autouse=True)
def small_card(accelerator: ModuleType) -> None:
    gc.collect()  # what earlier tests left lies on the card
    accelerator.set_limit(TOTAL)


@torch.no_grad()
def test_another_program_gets_what_it_asks_for_and_gives_it_back(accelerator: ModuleType) -> None:
    model = Chain(WIDTHS, seed=1)
    x = inputs()
    expected = model(x)
    with ready(model) as session:
        full = session.report()
        assert full.streamed_bytes == 0
        held, pools = 0, []
        while held < 100 * MIB:
            held += MARGIN // 2
            accelerator.set_others(held)  # fails if it is not free
            assert torch.equal(model(x.to("fake")).cpu(), expected)
            pools.append(session.report().pool_bytes)
        assert pools == sorted(pools, reverse=True)
        assert pools[-1] < full.pool_bytes / 3
        report = session.report()
        assert report.sheds >= 3 and report.growths == 0
        assert report.streamed_bytes > 0
        assert "sheds, 0 growths" in str(report)

        accelerator.set_others(0)
        for _ in range(GROW_AFTER):
            assert torch.equal(model(x.to("fake")).cpu(), expected)
        report = session.report()
        assert report.growths == 1
        assert (report.pool_bytes, report.streamed_bytes) == (full.pool_bytes, 0)
        assert torch.equal(model(x.to("fake")).cpu(), expected)


@torch.no_grad()
def test_reserve_is_left_free(accelerator: ModuleType) -> None:
    with ready(Chain(WIDTHS, seed=2), reserve=TOTAL - 40 * MIB) as session:
        assert accelerator.mem_get_info()[0] >= TOTAL - 40 * MIB + MARGIN
        assert session.report().streamed_bytes > 0


@torch.no_grad()
def test_a_cap_and_a_reserve_both_hold(accelerator: ModuleType) -> None:
    with ready(Chain(WIDTHS, seed=3), vram="30MiB", reserve="1MiB") as session:
        assert session.report().pool_bytes <= 30 * MIB
        accelerator.set_others(TOTAL - 32 * MIB)
        model = session.model
        model(inputs().to("fake"))
        assert accelerator.mem_get_info()[0] >= MARGIN * 11 // 16 + MIB
        accelerator.set_others(0)
        for _ in range(GROW_AFTER + 2):
            model(inputs().to("fake"))
        assert 24 * MIB < session.report().pool_bytes <= 30 * MIB
        assert session.report().growths == 1


def test_a_reserve_that_leaves_nothing_is_refused(accelerator: ModuleType) -> None:
    with pytest.raises(CapError, match=r"reserve is 128.0 MiB but the device has 128.0 MiB"):
        blockswap.attach(Chain(WIDTHS, seed=4), device="fake", reserve=TOTAL)
    with pytest.raises(CapError, match=r"how much memory this device has is not known"):
        blockswap.attach(Chain(WIDTHS, seed=4), device="cpu", reserve="1MiB")


@torch.no_grad()
@pytest.mark.parametrize("steals", [1, 2, 3])
def test_a_plan_that_finds_its_memory_taken_makes_way_for_a_smaller_one(
    accelerator: ModuleType, monkeypatch: pytest.MonkeyPatch, steals: int
) -> None:
    model = Chain(WIDTHS, seed=5)
    x = inputs()
    expected = model(x)
    make = Plans.make
    taken = 0

    def make_and_lose(self: Plans, learned: object) -> object:
        nonlocal taken
        made = make(self, learned)  # type: ignore[arg-type]
        if taken < steals:
            left = 24 * MIB // 4**taken  # too little for what has just been planned
            taken += 1
            accelerator.set_others(TOTAL - accelerator.memory_allocated() - left)
        return made

    monkeypatch.setattr(Plans, "make", make_and_lose)
    with ready(model) as session:
        assert taken == steals
        for _ in range(STEPS):
            assert torch.equal(model(x.to("fake")).cpu(), expected)
        assert session.report().pool_bytes < 48 * MIB
        accelerator.set_others(0)
        for _ in range(STEPS + HOLD_OFF_STEPS):
            assert torch.equal(model(x.to("fake")).cpu(), expected)
        assert session.report().streamed_bytes == 0  # it waited for its memory


@torch.no_grad()
def test_a_device_without_room_for_any_ring_is_an_error_and_the_next_call_is_right(
    accelerator: ModuleType,
) -> None:
    model = Chain(WIDTHS, seed=6)
    x = inputs()
    expected = model(x)
    with ready(model) as session:
        session.vacate()
        accelerator.set_others(accelerator.mem_get_info()[0] - MIB // 2)
        with pytest.raises(DeviceError, match="has no"):
            model(x.to("fake"))
        accelerator.set_others(0)
        for _ in range(STEPS):
            assert torch.equal(model(x.to("fake")).cpu(), expected)
        assert session.report().streamed_bytes == 0


@torch.no_grad()
def test_input_shapes_that_alternate_shed_and_grow_back(accelerator: ModuleType) -> None:
    model = Chain(WIDTHS, seed=9)
    shapes = [inputs(), inputs()[:2]]
    expected = [model(x) for x in shapes]
    with ready(model) as session:
        full = session.report().pool_bytes

        def alternate() -> None:
            for _ in range(STEPS):
                for x, wanted in zip(shapes, expected, strict=True):
                    assert torch.equal(model(x.to("fake")).cpu(), wanted)

        alternate()
        accelerator.set_others(accelerator.mem_get_info()[0] - 2 * MIB)
        alternate()
        assert session.report().pool_bytes < full - 8 * MIB
        assert accelerator.mem_get_info()[0] >= MARGIN * 11 // 16
        accelerator.set_others(0)
        alternate()
        report = session.report()
        assert report.pool_bytes == full
        assert report.sheds and report.growths


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        {"block_size": "16MiB"},
        {"mode": "chunkwise", "block_size": "8MiB"},
        {"mode": "layerwise"},
        {"swap_space": "8MiB"},
        {"offload": "30MiB"},
        {"priorities": {"layers.*": "pin"}},
    ],
    ids=str,
)
def test_options_that_allow_no_smaller_plan_keep_the_one_that_runs(
    accelerator: ModuleType, options: dict[str, object]
) -> None:
    model = Chain(WIDTHS, seed=10)
    x = inputs()
    expected = model(x)
    with ready(model, **options) as session:
        before = session.report().pool_bytes
        for left in (8, 2, 1):
            used = accelerator.memory_allocated()
            accelerator.set_others(TOTAL - used - left * MIB)
            for _ in range(GROW_AFTER + 1):
                assert torch.equal(model(x.to("fake")).cpu(), expected)
        accelerator.set_others(0)
        for _ in range(STEPS + HOLD_OFF_STEPS):
            assert torch.equal(model(x.to("fake")).cpu(), expected)
        assert session.report().pool_bytes == before


@torch.no_grad()
def test_a_capped_session_whose_memory_was_taken_returns_to_its_plan(
    accelerator: ModuleType,
) -> None:
    model = Chain(WIDTHS, seed=11)
    x = inputs()
    expected = model(x)
    with ready(model, vram="60MiB") as session:
        session.vacate()
        accelerator.set_others(accelerator.mem_get_info()[0] - 20 * MIB)
        assert torch.equal(model(x.to("fake")).cpu(), expected)
        assert session.report().streamed_bytes > 0
        accelerator.set_others(0)
        model(x.to("fake"))
        model(x.to("fake"))
        assert session.report().streamed_bytes == 0


@torch.no_grad()
def test_small_parameters_edited_while_there_is_no_memory_are_right_later(
    accelerator: ModuleType,
) -> None:
    model = Chain(WIDTHS, seed=12)
    x = inputs()
    with ready(model) as session:
        session.vacate()
        accelerator.set_others(accelerator.mem_get_info()[0] - MIB // 2)
        with pytest.raises(DeviceError):
            model(x.to("fake"))
        before = accelerator.writes_after_free()
        model.layers[0][2].weight.data += 0.5
        accelerator.set_others(0)
        output = model(x.to("fake")).cpu()
        accelerator.synchronize()
        assert accelerator.writes_after_free() == before
    assert torch.equal(output, model(x))


@torch.no_grad()
def test_two_sessions_leave_room_for_each_others_activations(accelerator: ModuleType) -> None:
    large, small = Bursting(WIDTHS, seed=13), Chain([512] * 97, seed=14)
    large.burst = 24 * MIB
    with (
        blockswap.attach(large, device="fake") as first,
        blockswap.attach(small, device="fake") as second,
    ):
        for _ in range(3 * STEPS):
            large(inputs().to("fake"))
            small(inputs().to("fake"))
        assert first.report().ooms == second.report().ooms == 0
        assert accelerator.mem_get_info()[0] >= 24 * MIB + MARGIN * 11 // 16
