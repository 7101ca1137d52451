"""What the denoisers of a pipeline give a component that computes whole, and get back."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

import blockswap
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
