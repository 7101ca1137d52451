"""Whether a forward that found no memory can run again with the same result."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, type(None))


class Attempt:
    """One forward, and what it may use up.

    It can be repeated when its inputs are tensors and plain values that it has not written to, and
    nothing in the model goes on from call to call: no cache hook, no batch statistics, no forward
    that another tool put there. Random numbers are drawn again from where they were.

    Args:
        module: whose forward it is.
        inputs: positional and keyword arguments.
        device: where it computes.
    """

    def __init__(self, module: nn.Module, inputs: tuple[object, ...], device: torch.device) -> None:
        self._module = module
        self._inputs = inputs
        self._versions = [_version(tensor) for tensor in _tensors(inputs)]
        self._drawn = torch.default_generator.get_state()
        self._device = device
        self._drawn_there: torch.Tensor | None = None
        # A graph's generator tells no state while it is captured; nor can a capture be repeated.
        self._is_captured = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if device.type == "cuda" and not self._is_captured:
            self._drawn_there = torch.cuda.get_rng_state(device)

    def rewind(self) -> bool:
        """Make everything as it was before; False: that is not possible."""
        if self._is_captured or not _is_plain(self._inputs) or self._goes_on():
            return False
        versions = [_version(tensor) for tensor in _tensors(self._inputs)]
        if None in versions or versions != self._versions:
            return False
        torch.default_generator.set_state(self._drawn)
        if self._drawn_there is not None:
            torch.cuda.set_rng_state(self._drawn_there, self._device)
        return True

    def _goes_on(self) -> bool:
        """Whether a call leaves something in the model that the next one reads."""
        return any(
            (module.training and isinstance(module, nn.modules.batchnorm._NormBase))
            or _has_cache(module)
            or _is_foreign(module)
            for module in self._module.modules()
        )


def _version(tensor: torch.Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    return isinstance(value, (torch.Tensor, *PLAIN))


def _has_cache(module: nn.Module) -> bool:
    registry = module.__dict__.get("_diffusers_hook")
    hooks = getattr(registry, "hooks", None) or {}
    return any(getattr(hook, "_is_stateful", False) for hook in hooks.values())


def _is_foreign(module: nn.Module) -> bool:
    """Whether a tool has exchanged the class's forward, as TeaCache does to count steps."""
    owner = next((cls for cls in type(module).__mro__ if "forward" in vars(cls)), None)
    if owner is None:
        return False
    return getattr(vars(owner)["forward"], "__module__", None) != owner.__module__
