"""Weights go back to where they came from, also where the device does not answer any more."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

from blockswap import _C
from blockswap.binding import unwatch
from blockswap.errors import DeviceError
from blockswap.together import name_of

if TYPE_CHECKING:
    from blockswap.model_state import ModelState


class Attempts:
    """Does one thing after another, whatever becomes of each.

    Attributes:
        failures: what the device, or PyTorch, had against them.
    """

    def __init__(self) -> None:
        self.failures: list[RuntimeError] = []

    def __call__(self, act: Callable[[], object]) -> None:
        """Do it; a RuntimeError is kept."""
        try:
            act()
        except RuntimeError as error:
            self.failures.append(error)


def give_back(state: ModelState, settles: bool) -> DeviceError | None:
    """Make a model's weights ordinary, whatever the device says.

    Args:
        state: of its session, which has taken it.
        settles: whether edits are brought into the images first.

    Returns:
        What to raise when all else is done: the device failed. Weights with an image are in host
        memory then; others may be lost.
    """
    attempt = Attempts()
    with torch.inference_mode(mode=False), torch.no_grad():
        if settles:
            attempt(state.reconcile)
        attempt(state.engine.stop)
        if attempt.failures:
            attempt(state.engine.stop)  # one stream's error has kept it from waiting for others
        attempt(state.memory.forget)
        state.pool.release()
        attempt(state.pool.give_back)
        state.binding.retire()
        if "host" in state.__dict__:  # taking may have been broken off anywhere
            state.host.arena.unpin()
        attempt(lambda: _to_origins(state))
        state.casts.give_back()
        unwatch(state.plain)
        if "fixed" in state.__dict__:
            attempt(state.fixed.to_origin)
    return _told(attempt.failures[0], state) if attempt.failures else None


def _to_origins(state: ModelState) -> None:
    """Bring parameters from their images to where they came from; if one fails, none moves."""
    moved: list[tuple[int, nn.Parameter]] = []
    try:
        for index, origin in enumerate(state.origins):
            _, _, parameter = state.entries[index]
            if parameter.device != origin:
                _C.set_data(parameter, parameter.detach().to(origin))
                moved.append((index, parameter))
    except RuntimeError:
        for index, parameter in moved:
            _C.set_data(parameter, state.binding.host(index))
        raise


def _told(error: RuntimeError, state: ModelState) -> DeviceError:
    unread = state.fixed.unread if "fixed" in state.__dict__ else []
    lost = ""
    if unread:
        lost = (
            f", but {len(unread)} tensors outside the blocks are on the device and could not be"
            f" read, the first is {unread[0]!r}: load the model again"
        )
    failure = DeviceError(
        f"{name_of(state.model)} is given back, but the device failed: {error}. Weights that"
        f" streamed are whole in host memory{lost}"
    )
    failure.__cause__ = error
    return failure
