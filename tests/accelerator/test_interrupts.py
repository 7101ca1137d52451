"""Ctrl-C between any two lines of a component's move, on the fake accelerator."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from blockswap.guests import Guest
from tests.accelerator.test_guests import Mixed
from tests.interrupting import OURS, is_interrupted

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
