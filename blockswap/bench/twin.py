"""An unhooked twin on the device: what an engine that keeps all weights is measured beside."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from blockswap.bench.core import Core
from blockswap.bench.engines import RESIDENT
from blockswap.bench.timing import Resident, timed_steps

STEPS_OF_TURN = 3
# A longer step hides what the host does, and clocks have time to settle in it.
LONG_STEP_MS = 1000.0
SPARE_BYTES = 8 * 2**30  # left free beside both: what kernels want for a while


def fresh(model: nn.Module) -> nn.Module:
    """Return a model of its own that shares the weights' memory: engines rebind its parameters."""
    own = {id(p): nn.Parameter(p.data, requires_grad=False) for p in model.parameters()}
    return copy.deepcopy(model, dict(own))


def place_twin(
    model: nn.Module, resident: Resident, device: str, to_come: int = 0
) -> nn.Module | None:
    """Return the model unhooked on a device.

    None where the device has no room for another one, or where steps are so long that two engines
    can be measured one after the other.

    Args:
        model: in host memory.
        resident: the same, measured.
        device: where to.
        to_come: bytes that the engine is yet to take there.
    """
    if resident.step_ms > LONG_STEP_MS:
        return None
    if device != "cpu":
        free = torch.cuda.mem_get_info(torch.device(device))[0]
        if free < resident.peak_device_bytes + to_come + SPARE_BYTES:
            return None
    twin = fresh(model)
    RESIDENT.put(twin, torch.device(device), {})
    return twin


def time_beside_twin(
    shell: nn.Module,
    model: nn.Module,
    inputs: dict[str, Any],
    resident: Resident,
    device: str,
    turns: int,
) -> tuple[list[float], list[float], Any] | None:
    """Return what `steps_in_turns` does with a twin that is there for no longer; None: no room.

    Args:
        shell: as an engine has placed it.
        model: the same in host memory.
        inputs: on the device.
        resident: the same, measured.
        device: where the twin is to be.
        turns: how many.
    """
    try:
        twin = place_twin(model, resident, device)
        return None if twin is None else steps_in_turns(shell, twin, inputs, turns)
    except torch.OutOfMemoryError:
        return None


def bytes_on_gpu(twin: nn.Module | None) -> int:
    """Return what the twin's weights take of a GPU's memory."""
    return sum(p.nbytes for p in twin.parameters() if p.is_cuda) if twin is not None else 0


def steps_in_turns(
    model: nn.Module, twin: nn.Module, inputs: dict[str, Any], turns: int
) -> tuple[list[float], list[float], Any]:
    """Return ms of steps of a model and of its twin in the same seconds, and the model's output.

    The clocks of a GPU, and a host that others use, too, change both alike. Each goes first in
    every second turn: the core that was fastest when it was chosen is slower a moment later.

    Args:
        model: as an engine has placed it.
        twin: the same weights on the device.
        inputs: of both.
        turns: each one `STEPS_OF_TURN` steps of each, whose first one does not count.
    """
    times: list[float] = []
    of_twin: list[float] = []
    output: Any = None
    core = Core()
    try:
        for turn in range(turns):
            core.choose()
            for what in (twin, model) if turn % 2 == 0 else (model, twin):
                some, last = timed_steps(what, inputs, STEPS_OF_TURN)
                if what is model:
                    times += some[1:]
                    output = last
                else:
                    of_twin += some[1:]
    finally:
        core.free()
    return times, of_twin, output
