"""What the denoisers of a pipeline give a component that computes whole, and get back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from torch import nn

import blockswap
from blockswap import turns
from blockswap.device_memory import DeviceMemory, Tally
from blockswap.guests import Guest
from blockswap.placement import Placement
from tests.accelerator.test_pipelines import devices, on_fake
from tests.pipelines import draw, make

MIB = 2**20


@torch.no_grad()
def test_a_component_that_needs_more_than_in_its_first_turn_gets_what_the_denoiser_holds(
    accelerator: ModuleType, tmp_path: Path
) -> None:
    pipe, call = make("flux", tmp_path)
    expected = on_fake(pipe, call)
    weights = sum(p.nbytes for p in pipe.transformer.parameters())
    cap = accelerator.memory_allocated() + 2 * weights + 32 * MIB
    taken = [1]

    def take_much(*_: object) -> None:
        torch.empty(taken[0], dtype=torch.uint8, device="fake")

    pipe.vae.decoder.conv_in.register_forward_hook(take_much)
    with blockswap.attach(pipe, device="fake", vram=cap) as session:
        for _ in range(3):
            assert np.array_equal(draw(pipe, call), expected)
        held = session.sessions["transformer"].report().pool_bytes
        assert held > weights // 2, "the denoiser stays beside a small component"
        taken[0] = cap - held
        assert np.array_equal(draw(pipe, call), expected)
        assert session.sessions["transformer"].report().pool_bytes == 0
        report = session.report()
        assert report.guests["vae"].peak_bytes <= cap
        assert np.array_equal(draw(pipe, call), expected)


@torch.no_grad()
def test_the_denoiser_gives_a_component_only_what_it_lacks(
    accelerator: ModuleType, tmp_path: Path
) -> None:
    pipe, call = make("flux", tmp_path)
    expected = on_fake(pipe, call)
    weights = sum(p.nbytes for p in pipe.transformer.parameters())
    cap = accelerator.memory_allocated() + 2 * weights + 32 * MIB
    seen: list[int] = []

    def take_much(*_: object) -> None:
        seen.append(session.sessions["transformer"]._state.memory.pool_bytes)
        torch.empty(2 * weights, dtype=torch.uint8, device="fake")

    pipe.vae.decoder.conv_in.register_forward_hook(take_much)
    with blockswap.attach(pipe, device="fake", vram=cap, check=True) as session:
        for _ in range(8):
            assert np.array_equal(draw(pipe, call), expected)
        report = session.report()
        assert report.guests["vae"].peak_bytes <= cap
        assert seen[0] == 0, "nobody knows what a component takes before its first turn"
        assert all(0 < held < weights for held in seen[1:])
        recopied: list[int] = []
        copy = Placement.copy
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Placement, "copy", lambda p, n: (recopied.append(n), copy(p, n)))
            assert np.array_equal(draw(pipe, call), expected)
        units = session.sessions["transformer"]._state.units
        assert 0 < len(recopied) < len(units) // 2
    assert set(devices(pipe).values()) == {"cpu"}


def attached(pipe: Any, cap: int, call: dict[str, Any], expected: Any) -> Any:
    """Return the session of a pipeline whose components have had their turns."""
    session = blockswap.attach(pipe, device="fake", vram=cap)
    for _ in range(3):
        assert np.array_equal(draw(pipe, call), expected)
    return session


def flux_under(accelerator: ModuleType, folder: Path, mib: int) -> tuple[Any, ...]:
    """Return a small FLUX, a call, its picture, and a session with so many MiB for all of it."""
    pipe, call = make("flux", folder)
    expected = on_fake(pipe, call)
    cap = accelerator.memory_allocated() + mib * MIB
    return pipe, call, expected, cap, attached(pipe, cap, call, expected)


@torch.no_grad()
def test_a_components_weights_come_under_the_cap(
    accelerator: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, call, expected, cap, session = flux_under(accelerator, tmp_path, 64)
    with session:
        limits: list[float] = []
        come = Guest.enter

        def enter(guest: Guest) -> None:
            held = sum(one._state.memory.pool_beside_bytes for one in session.sessions.values())
            limit = accelerator.get_per_process_memory_fraction()
            total = accelerator.mem_get_info()[1]
            limits.append(limit * total + held)
            come(guest)

        monkeypatch.setattr(Guest, "enter", enter)
        assert np.array_equal(draw(pipe, call), expected)
    assert limits and all(limit <= cap for limit in limits)


@torch.no_grad()
def test_a_component_that_finds_no_memory_gets_what_the_denoiser_holds(
    accelerator: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, call, expected, _, session = flux_under(accelerator, tmp_path, 64)
    with session:
        denoiser = session.sessions["transformer"]
        held: list[int] = []
        come = Guest.enter

        def enter(guest: Guest) -> None:
            held.append(denoiser.report().pool_bytes)
            if held[-1]:
                raise torch.OutOfMemoryError("PyTorch's cache is in pieces")
            come(guest)

        monkeypatch.setattr(Guest, "enter", enter)
        assert np.array_equal(draw(pipe, call), expected)
        assert held[0] > 0 == held[1]
        monkeypatch.undo()
        assert np.array_equal(draw(pipe, call), expected)


@pytest.mark.parametrize(("copies", "gives"), [(1, False), (10**6, True)])
@torch.no_grad()
def test_what_a_pipeline_makes_of_a_large_result_finds_pytorchs_cache_given_back(
    copies: int,
    gives: bool,
    accelerator: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pipe, call, expected, _, session = flux_under(accelerator, tmp_path, 512)
    with session:
        said: list[str] = []
        decode, give_back = AutoencoderKL.decode, DeviceMemory.give_back

        def decoded(*args: Any, **kwargs: Any) -> Any:
            result = decode(*args, **kwargs)
            said.append("decoded")
            return result

        monkeypatch.setattr(turns, "COPIES_OF_RESULT", copies)
        monkeypatch.setattr(AutoencoderKL, "decode", decoded)
        monkeypatch.setattr(
            DeviceMemory, "give_back", lambda memory: said.append("gave") or give_back(memory)
        )
        assert np.array_equal(draw(pipe, call), expected)
    after = said[said.index("decoded") :]
    assert (after[:2] == ["decoded", "gave"]) is gives


class Cache:
    """What PyTorch is made to have cached; and in which order components come and leave."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bytes = 0
        self.said: list[str] = []
        tally, enter, leave = DeviceMemory.tally, Guest.enter, Guest.leave

        def counted(memory: DeviceMemory) -> Tally:
            now = tally(memory)
            return replace(now, reserved=now.reserved + self.bytes)

        def give_back(memory: DeviceMemory) -> int:
            self.said += ["gave"] if self.bytes else []
            given, self.bytes = self.bytes, 0
            return given

        def said(what: str, act: Callable[[Guest], None]) -> Callable[[Guest], None]:
            return lambda guest: self.said.append(f"{guest.name} {what}") or act(guest)

        monkeypatch.setattr(DeviceMemory, "tally", counted)
        monkeypatch.setattr(DeviceMemory, "give_back", give_back)
        monkeypatch.setattr(Guest, "enter", said("comes", enter))
        monkeypatch.setattr(Guest, "leave", said("leaves", leave))


@torch.no_grad()
def test_what_a_turn_left_cached_goes_back_before_anything_small_settles_in_it(
    accelerator: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, call, expected, _, session = flux_under(accelerator, tmp_path, 512)
    with session:
        cache = Cache(monkeypatch)
        pipe.vae.decoder.conv_out.register_forward_hook(
            lambda *_: setattr(cache, "bytes", 128 * MIB)
        )
        assert np.array_equal(draw(pipe, call), expected)
        assert np.array_equal(draw(pipe, call), expected)
        left = cache.said.index("vae leaves")
        assert cache.said[left + 1] == "gave"
        assert "gave" not in cache.said[:left], "the cap leaves room for it"


@torch.no_grad()
def test_a_component_that_the_cache_leaves_no_room_finds_it_empty(
    accelerator: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, call, expected, cap, session = flux_under(accelerator, tmp_path, 512)
    with session:
        cache = Cache(monkeypatch)
        cache.bytes = cap - accelerator.memory_allocated()
        pipe.vae.decode(torch.zeros(1, 16, 4, 4, device="fake"))
        assert cache.said[:2] == ["gave", "vae comes"]
        assert np.array_equal(draw(pipe, call), expected)


class Workspace:
    """A convolution's, at the end of a VAE: other bits where there is no memory for it.

    Attributes:
        bytes: what it takes.
        lacks: what it is to lack of the cap when it is wanted the next time.
        missed: how often it found nothing.
    """

    def __init__(self, accelerator: ModuleType, convolution: nn.Module, cap: int) -> None:
        self.bytes = self.lacks = self.missed = 0
        self._accelerator = accelerator
        self._cap = cap
        convolution.register_forward_hook(self)

    def __call__(self, module: nn.Module, _args: object, output: torch.Tensor) -> torch.Tensor:
        if self.lacks:
            self.bytes = self._cap - self._accelerator.memory_allocated() + self.lacks
            self.lacks = 0
        if output.device.type != "fake" or self._accelerator.try_workspace(self.bytes):
            return output
        self.missed += 1
        return output * 1.5


@torch.no_grad()
def test_a_vae_that_keeps_frames_within_a_call_is_called_again_before_its_bits_change(
    accelerator: ModuleType, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pipe, call = make("qwen", tmp_path)
    call = {k: v.to("fake") if isinstance(v, torch.Tensor) else v for k, v in call.items()}
    expected = on_fake(pipe, call)
    weights = sum(p.nbytes for p in pipe.transformer.parameters())
    cap = accelerator.memory_allocated() + 2 * weights + 32 * MIB
    workspace = Workspace(accelerator, pipe.vae.decoder.conv_out, cap)
    with attached(pipe, cap, call, expected) as session:
        workspace.lacks = session.sessions["transformer"].report().pool_bytes // 2
        assert workspace.lacks > 0
        assert np.array_equal(draw(pipe, call), expected)
        assert caplog.text.count("the denoisers have given back") == 1
        assert np.array_equal(draw(pipe, call), expected)
    assert workspace.missed == 0 < workspace.bytes


@torch.no_grad()
def test_a_component_for_whose_workspace_the_cap_is_too_small_is_told(
    accelerator: ModuleType, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pipe, call = make("qwen", tmp_path)
    call = {k: v.to("fake") if isinstance(v, torch.Tensor) else v for k, v in call.items()}
    expected = on_fake(pipe, call)
    cap = accelerator.memory_allocated() + 64 * MIB
    workspace = Workspace(accelerator, pipe.vae.decoder.conv_out, cap)
    with attached(pipe, cap, call, expected):
        assert "last bits" not in caplog.text
        workspace.bytes = cap
        draw(pipe, call)
    assert workspace.missed == 1
    assert "vae: PyTorch found no memory" in caplog.text and "last bits" in caplog.text
