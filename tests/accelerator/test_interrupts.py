"""Ctrl-C between any two lines of ours, on the fake accelerator: nothing stays on the device."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

import blockswap
from blockswap.attached import KEY
from blockswap.config import SwapConfig
from blockswap.device_memory import DeviceMemory
from blockswap.guests import Guest
from blockswap.turns import Turns
from tests.accelerator.test_guests import Mixed
from tests.accelerator.test_sessions import Chain
from tests.interrupting import OURS, is_interrupted
from tests.pipelines import draw, make

GUESTS = OURS + "guests.py"


@torch.no_grad()
@pytest.mark.parametrize("pins", [False, True])
def test_a_turn_that_is_interrupted_where_it_begins_or_ends_leaves_nothing_behind(
    accelerator: ModuleType, pins: bool
) -> None:
    module = Mixed()
    right = {name: tensor.detach().clone() for name, tensor in module.tensors().items()}
    guest = Guest("mixed", module, torch.empty(0, device="fake").device, pins=pins)
    guest.pin()
    at, ends = 1, False
    while True:
        if ends:
            guest.enter()
            module.low.weight.data += 1  # counts no version
            right["low.weight"] += 1
        was_interrupted = is_interrupted(guest.leave if ends else guest.enter, at, within=GUESTS)
        if not was_interrupted and ends:
            break
        guest.leave()
        for name, tensor in module.tensors().items():
            assert tensor.device.type == "cpu", (at, name)
            assert torch.equal(tensor, right[name]), (at, name)
        assert type(module.low._parameters) is dict
        at, ends = (at + 1, ends) if was_interrupted else (1, True)
    assert at > 50


@torch.no_grad()
def test_a_pause_that_is_interrupted_anywhere_is_completed_by_resume(
    accelerator: ModuleType,
) -> None:
    model = Chain([128] * 9, seed=1)
    x = torch.randn(4, 128, generator=torch.Generator().manual_seed(1))
    expected = model(x)
    at = 1
    while True:
        session = blockswap.attach(model, device="fake", offload="250kB", check=True)
        model(x.to("fake"))
        if not is_interrupted(session.pause, at):
            break
        assert session.state in ("learning", "paused")
        session.resume()
        assert torch.equal(model(x.to("fake")).cpu(), expected)
        session.detach()
        assert {p.device.type for p in model.parameters()} == {"cpu"}
        assert torch.equal(model(x), expected)
        at += 7
    session.detach()
    assert at > 100


def test_what_a_broken_off_turn_left_on_the_device_leaves_with_the_next_end(
    accelerator: ModuleType,
) -> None:
    module = Mixed()
    memory = DeviceMemory(torch.device("fake", 0))
    config = SwapConfig(device="fake").resolve(memory.total_bytes())
    guest = Guest("mixed", module, memory.device)
    turns = Turns([], [], memory, config, lambda _: None, list)
    for begins in (True, False):
        at, was_interrupted = 1, True
        while was_interrupted:
            if not begins:
                turns.begin(guest)
            act = (lambda: turns.begin(guest)) if begins else turns.end
            was_interrupted = is_interrupted(act, at, within=(OURS + "turns.py", GUESTS))
            if at % 2:
                turns.begin(guest)
                assert {t.device.type for t in module.tensors().values()} == {"fake"}, at
            turns.end()
            assert {t.device.type for t in module.tensors().values()} == {"cpu"}, at
            at += 1
        assert at > 30


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pause", "detach"])
def test_a_pipeline_whose_end_is_interrupted_anywhere_draws_after_resume_or_another_attach(
    accelerator: ModuleType, tmp_path: Path, name: str
) -> None:
    pipe, call = make("sdxl", tmp_path)
    pipe.to("fake")
    expected = draw(pipe, call, steps=1)
    pipe.to("cpu")
    at, was_interrupted = 1, True
    while was_interrupted:
        session = blockswap.attach(pipe, device="fake", offload="4MB", check=True)
        end = getattr(session, name)
        was_interrupted = is_interrupted(end, at, within=OURS + "pipeline.py")
        blockswap.attach(pipe, device="fake", offload="4MB", check=True)
        assert np.array_equal(draw(pipe, call, steps=1), expected), at
        assert {p.device.type for p in pipe.vae.parameters()} == {"cpu"}, at  # its turn has ended
        (pipe.__dict__.get(KEY) or session).detach()
        assert {p.device.type for p in pipe.unet.parameters()} == {"cpu"}
        at += 4
    assert at > 12
