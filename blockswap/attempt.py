"""Whether a forward that found no memory can run again with the same result."""

from __future__ import annotations

import dis
import functools
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import nn

PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, type(None))
# What every module has, and what of it calls do not change.
_OWN = frozenset(vars(nn.Module())) - {"training"}
OURS = "_blockswap_forward"  # where a forward that we have put on a module bears a Mark


class Mark(Protocol):
    """Tells a forward of ours from a wrapper around it, which bears the same mark."""

    @property
    def forward(self) -> object:
        """Return the one that is marked."""


class Attempt:
    """One forward, and what it may use up of its inputs.

    Args:
        inputs: positional and keyword arguments.
        device: where it computes.
    """

    def __init__(self, inputs: tuple[object, ...], device: torch.device) -> None:
        self._inputs = inputs
        self._before = list(_walk(inputs))
        self._drawn = torch.default_generator.get_state()
        self._device = device
        self._drawn_there: torch.Tensor | None = None
        # A graph's generator tells no state while it is captured; nor can a capture be repeated.
        self._is_captured = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if device.type == "cuda" and not self._is_captured:
            self._drawn_there = torch.cuda.get_rng_state(device)

    def is_untouched(self) -> bool:
        """Whether its inputs are what they were."""
        now = list(_walk(self._inputs))
        if self._is_captured or len(now) != len(self._before):
            return False
        if any(a is not b or m != n for (a, m), (b, n) in zip(self._before, now, strict=True)):
            return False
        return all(mark is not None for _, mark in now)

    def rewind(self) -> bool:
        """Draw random numbers from where it did; False: its inputs are not what they were."""
        if not self.is_untouched():
            return False
        torch.default_generator.set_state(self._drawn)
        if self._drawn_there is not None:
            torch.cuda.set_rng_state(self._drawn_there, self._device)
        return True


class Stillness:
    """What a model keeps from call to call, as it was; a forward must not have changed it.

    Its tensors' versions, its plain attributes, and those of lists and dictionaries one level deep.
    What a VAE of diffusers begins each call without does not count.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._before = self._kept()

    def holds(self) -> bool:
        """Whether nothing has changed, and no tool is there that keeps what we cannot see."""
        modules = list(self._model.modules())
        if any(_has_cache(module) or _is_foreign(module) for module in modules):
            return False
        return self._before is not None and self._before == self._kept()

    def _kept(self) -> list[tuple[object, ...]] | None:
        kept: list[tuple[object, ...]] = []
        for module in self._model.modules():
            passing = _passing(module)
            for buffer in module._buffers.values():
                if buffer is not None:
                    if buffer.is_inference():
                        return None
                    kept.append((id(buffer), buffer._version))
            for name, value in vars(module).items():
                if name in _OWN or name == "forward" or name in passing:
                    continue
                if isinstance(value, torch.Generator):
                    return None
                if isinstance(value, (list, dict, set)):
                    items = value.items() if isinstance(value, dict) else value
                    kept.append((id(module), name, *map(_identity, items)))
                elif isinstance(value, (PLAIN, torch.Tensor)):
                    kept.append((id(module), name, _identity(value)))
        return kept


def _passing(module: nn.Module) -> frozenset[str]:
    """Return the attributes that a VAE of diffusers sets anew before it encodes or decodes.

    Those that its `clear_cache` sets: Wan's and Qwen-Image's keep each convolution's last frames.
    """
    clear = getattr(type(module), "clear_cache", None)
    is_vae = type(module).__module__.startswith("diffusers.models.autoencoders.")
    return _set_by(clear) if is_vae and clear is not None else frozenset()


@functools.cache
def _set_by(method: Callable[..., object]) -> frozenset[str]:
    code = dis.get_instructions(method)
    return frozenset(str(step.argval) for step in code if step.opname == "STORE_ATTR")


def _identity(item: object) -> object:
    if isinstance(item, tuple):
        return tuple(map(_identity, item))
    if isinstance(item, torch.Tensor) and not item.is_inference():
        return id(item), item._version
    return item if isinstance(item, PLAIN) else id(item)


def _walk(value: Any) -> Iterator[tuple[object, object]]:
    """Yield every object of nested inputs with what would change in it; None: nobody knows."""
    if isinstance(value, torch.Tensor):
        yield value, (None if value.is_inference() else value._version)
    elif isinstance(value, (tuple, list)):
        yield value, len(value)
        for item in value:
            yield from _walk(item)
    elif isinstance(value, dict):
        yield value, tuple(value)
        for item in value.values():
            yield from _walk(item)
    else:
        yield value, (0 if isinstance(value, PLAIN) else None)


def _has_cache(module: nn.Module) -> bool:
    if module.training and isinstance(module, nn.modules.batchnorm._NormBase):
        return True
    registry = module.__dict__.get("_diffusers_hook")
    hooks = getattr(registry, "hooks", None) or {}
    return any(getattr(hook, "_is_stateful", False) for hook in hooks.values())


def _is_foreign(module: nn.Module) -> bool:
    """Whether a tool has exchanged the forward, of the class or of this module, to keep count."""
    owner = next((cls for cls in type(module).__mro__ if "forward" in vars(cls)), None)
    if owner is not None and getattr(vars(owner)["forward"], "__module__", "") != owner.__module__:
        return True
    return is_foreign(module, vars(module).get("forward"))


def is_foreign(module: nn.Module, forward: Any) -> bool:
    """Whether a forward that lies on a module itself is neither its class's, ours, nor diffusers'.

    diffusers' hooks put theirs there; whether one of them keeps state is told by the hook.
    """
    mark: Mark | None = getattr(forward, OURS, None)
    if forward is None or (mark is not None and mark.forward is forward):
        return False
    function = forward.func if isinstance(forward, functools.partial) else forward
    function = getattr(function, "__func__", function)
    is_hook = str(getattr(function, "__module__", "")).startswith("diffusers.hooks")
    return not is_hook and function is not getattr(type(module), "forward", None)
