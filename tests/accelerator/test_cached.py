"""What PyTorch keeps of freed memory counts to the cap, and goes back where others need the room."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

import blockswap
from blockswap import _C
from blockswap.device_memory import DeviceMemory
from blockswap.guests import Guest
from tests.accelerator.test_cap import WIDTHS, Drawing, drawn
from tests.accelerator.test_elastic import inputs
from tests.accelerator.test_pipelines import on_fake
from tests.accelerator.test_sessions import STEPS
from tests.pipelines import draw, make

MIB = 2**20


def take(num_bytes: int) -> torch.Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8, device="fake")


class Device:
    """PyTorch's memory with a cache, and the sessions' pools beside it."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module

    @property
    def reserved(self) -> int:
        return int(self.module.memory_reserved())

    @property
    def cached(self) -> int:
        return self.reserved - int(self.module.memory_allocated())

    def held(self, *sessions: blockswap.Session) -> int:
        """What nobody else can have, sessions' pages included."""
        beside = sum(session._state.memory.pool_beside_bytes for session in sessions)
        return self.reserved + beside

    def cap(self, mib: int) -> int:
        """So many MiB for what begins now."""
        gc.collect()
        self.module.empty_cache()
        return self.reserved + mib * MIB


@pytest.fixture
def device(accelerator: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    """As CUDA: sessions hold their weights in mapped pages, which PyTorch does not count."""
    begin, pool = DeviceMemory.__init__, _C.Pool

    def begins(memory: DeviceMemory, where: torch.device) -> None:
        begin(memory, where)
        memory.counts_pool = False

    monkeypatch.setattr(DeviceMemory, "__init__", begins)
    monkeypatch.setattr(_C, "Pool", lambda _, index, driver: pool("cuda", index, driver))
    driver, pages = _C.make_device("fake", 0), _C.make_host_pages(2**30)
    _C.set_pluggable_pool(0, _C.CachingPool(driver, pages, check=True))
    with accelerator.cached():
        yield Device(accelerator)
    _C.set_pluggable_pool(0, None)


# A session alone ---------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("mib", [28, 36, 52, 80])
def test_what_pytorch_reserves_and_a_session_stay_below_the_cap(device: Device, mib: int) -> None:
    model = Drawing(WIDTHS, seed=1).eval()
    model.burst = 6 * MIB  # out of a segment of 20 MiB
    expected = drawn(model, inputs())
    cap = device.cap(mib)
    with blockswap.attach(model, device="fake", check=True, vram=cap) as session:
        for _ in range(STEPS):
            assert torch.equal(drawn(model, inputs().to("fake")), expected)
        report = session.report()
        assert device.held(session) <= cap
        assert 20 * MIB < (report.peak_device_bytes or 0) <= cap
        assert (report.ooms, report.sheds, session.state) == (0, 0, "ready")


def settled(cap: int) -> tuple[Drawing, torch.Tensor, blockswap.Session]:
    model = Drawing(WIDTHS, seed=2).eval()
    expected = drawn(model, inputs())
    session = blockswap.attach(model, device="fake", check=True, vram=cap)
    for _ in range(2 * STEPS):
        drawn(model, inputs().to("fake"))
    assert session.state == "ready"
    return model, expected, session


@torch.no_grad()
def test_what_a_script_left_cached_beyond_the_cap_goes_back_before_a_forward(
    device: Device,
) -> None:
    cap = device.cap(40)
    model, expected, session = settled(cap)
    seen: list[int] = []
    with session:
        take(cap)  # between forwards nothing bounds it
        assert device.held(session) > cap
        model.layers[3].register_forward_hook(lambda *_: seen.append(device.held(session)))
        assert torch.equal(drawn(model, inputs().to("fake")), expected)
        assert seen and max(seen) <= cap


@torch.no_grad()
def test_what_is_cached_goes_back_before_residents_take_its_room(device: Device) -> None:
    cap = device.cap(40)
    model, expected, session = settled(cap)
    with session:
        session.vacate()
        take(30 * MIB)
        assert device.cached >= 30 * MIB and device.held(session) <= cap
        session._state.memory.watch()
        session._state.memory.peak_device_bytes = 0
        assert torch.equal(drawn(model, inputs().to("fake")), expected)
        assert session._state.memory.pool_bytes > 20 * MIB
        assert (session.report().peak_device_bytes or 0) <= cap


# A pipeline --------------------------------------------------------------------------------------


class Flux:
    """A small FLUX whose components have had their turns under a cap."""

    def __init__(self, device: Device, folder: Path, mib: int) -> None:
        self.pipe, self.call = make("flux", folder)
        self.expected = on_fake(self.pipe, self.call)
        self.cap = device.cap(mib)
        self.session = blockswap.attach(self.pipe, device="fake", vram=self.cap)
        self.sessions = list(self.session.sessions.values())
        for _ in range(3):
            self.draws()

    def draws(self) -> None:
        assert np.array_equal(draw(self.pipe, self.call), self.expected)

    def decode(self) -> Any:
        latents = torch.zeros(1, self.pipe.vae.config.latent_channels, 4, 4, device="fake")
        return self.pipe.vae.decode(latents.to(self.pipe.vae.dtype), return_dict=False)[0]


@pytest.fixture
def flux(device: Device, tmp_path: Path) -> Iterator[Callable[[int], Flux]]:
    made: list[Flux] = []

    def make_one(mib: int) -> Flux:
        made.append(Flux(device, tmp_path, mib))
        return made[-1]

    yield make_one
    for one in made:
        one.session.detach()


@torch.no_grad()
@pytest.mark.parametrize("mib", [72, 128])
def test_a_pipelines_call_stays_below_the_cap(
    device: Device, flux: Callable[[int], Flux], mib: int
) -> None:
    small = flux(mib)
    seen: list[int] = []
    for part in (small.pipe.text_encoder, small.pipe.text_encoder_2, small.pipe.transformer):
        part.register_forward_hook(lambda *_: seen.append(device.held(*small.sessions)))
    for _ in range(3):
        small.draws()
        seen.append(device.held(*small.sessions))
    assert seen and max(seen) <= small.cap
    report = small.session.report()
    peaks = [guest.peak_bytes for guest in report.guests.values()]
    peaks += [part.peak_device_bytes for part in report.parts.values()]
    assert all(peak is not None and 0 < peak <= small.cap for peak in peaks)


@torch.no_grad()
def test_what_a_text_encoder_left_cached_goes_back_before_the_denoiser_runs(
    device: Device, flux: Callable[[int], Flux]
) -> None:
    small = flux(512)
    seen: dict[str, int] = {}

    def take_much(*_: object) -> None:
        take(100 * MIB)
        seen["encoder"] = device.cached

    small.pipe.text_encoder_2.register_forward_hook(take_much)
    blocks = small.pipe.transformer.transformer_blocks
    blocks[0].register_forward_pre_hook(
        lambda *_: seen.setdefault("denoiser", device.cached) and None
    )
    small.draws()
    assert seen["encoder"] >= 100 * MIB > 2 * seen["denoiser"]


@torch.no_grad()
def test_a_component_that_the_cache_leaves_no_room_finds_it_empty(
    device: Device, flux: Callable[[int], Flux], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = flux(128)
    seen: list[int] = []
    come = Guest.enter
    monkeypatch.setattr(Guest, "enter", lambda guest: seen.append(device.cached) or come(guest))
    take(small.cap - device.held(*small.sessions) - 2 * MIB)
    cached = device.cached
    assert cached > 20 * MIB and device.held(*small.sessions) <= small.cap
    small.decode()
    assert len(seen) == 1 and seen[0] < min(cached, 20 * MIB)
    small.draws()


@torch.no_grad()
def test_what_a_script_left_cached_within_a_components_turn_goes_back_before_its_next_call(
    device: Device, flux: Callable[[int], Flux]
) -> None:
    small = flux(128)
    seen: list[int] = []
    right = small.decode()
    take(small.cap)
    assert device.held(*small.sessions) > small.cap
    small.pipe.vae.decoder.conv_in.register_forward_hook(
        lambda *_: seen.append(device.held(*small.sessions))
    )
    assert torch.equal(small.decode(), right)
    assert seen and max(seen) <= small.cap


@torch.no_grad()
def test_what_a_pipeline_makes_of_a_large_result_stays_below_the_cap(
    device: Device, flux: Callable[[int], Flux], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = flux(192)

    def decode(*_: object, **__: object) -> tuple[torch.Tensor]:
        result = torch.zeros(12 * MIB, dtype=torch.uint8, device="fake")
        left = small.cap - device.held(*small.sessions)
        # Together they fill the cap; none of them is large enough for a copy of the result.
        [take(10 * MIB) for _ in range(left // (10 * MIB))]
        return (result,)

    monkeypatch.setattr(AutoencoderKL, "decode", decode)
    result = small.decode()
    copies = [result.clone()]
    for _ in range(3):
        copies.append(copies[-1] + 1)
        assert device.held(*small.sessions) <= small.cap
