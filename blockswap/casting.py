"""diffusers' layerwise casting: weights stream as they are stored, and are cast on the device.

diffusers casts a leaf's weights before its forward and back after it: twice the work, and what
comes back is no longer where it streams. Here the stored weights wait, and the cast ones are
dropped.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from blockswap import _C

NAME = "layerwise_casting"  # of diffusers' hook
Wide = dict[nn.Parameter, torch.dtype]


class Casts:
    """Owns the casting hooks of a model until it gives them back."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._wide: Wide = {}  # used in this forward, and not stored in the dtype that is asked for
        self._taken: dict[nn.Module, _Cast] = {}

    def take(self) -> None:
        """Cast in diffusers' place."""
        for module in self._model.modules():
            hook = cast_of(module)
            if hook is not None:
                self._taken[module] = _Cast(module, hook, self._wide)
                self._taken[module].take()

    def is_complete(self) -> bool:
        """Whether no module has got a casting hook since."""
        return all(m in self._taken or cast_of(m) is None for m in self._model.modules())

    def store(self) -> None:
        """After a forward: cast what somebody put there in another dtype, as diffusers does."""
        for parameter, dtype in self._wide.items():
            _C.set_data(parameter, parameter.detach().to(dtype))
        self._wide.clear()

    def give_back(self) -> None:
        """Let diffusers cast again."""
        for cast in self._taken.values():
            cast.give_back()


class _Cast:
    """One module's casting hook: what it calls is exchanged."""

    def __init__(self, module: nn.Module, hook: Any, wide: Wide) -> None:
        self._calls = calls = hook.fn_ref
        self._theirs = (calls.pre_forward, calls.forward, calls.post_forward)
        original = calls.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            with torch.inference_mode(mode=False), torch.no_grad():
                stored = [(p, p.detach()) for p in module._parameters.values() if p is not None]
            try:
                with torch.inference_mode(mode=False), torch.no_grad():
                    for parameter, value in stored:
                        _C.set_data(parameter, value.to(hook.compute_dtype))
                return original(*args, **kwargs)
            finally:
                for parameter, value in stored:
                    _C.set_data(parameter, value)
                    if value.dtype != hook.storage_dtype:
                        wide[parameter] = hook.storage_dtype

        self._forward = forward

    def take(self) -> None:
        calls = self._calls
        calls.pre_forward, calls.post_forward = _pass_inputs, _pass_output
        calls.forward = self._forward

    def give_back(self) -> None:
        calls = self._calls
        if calls.forward is self._forward:
            calls.pre_forward, calls.forward, calls.post_forward = self._theirs


def _pass_inputs(_module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return args, kwargs


def _pass_output(_module: nn.Module, output: Any) -> Any:
    return output


def cast_of(module: nn.Module) -> Any:
    """Return the hook by which diffusers casts a module's weights, or None."""
    hooks = getattr(module.__dict__.get("_diffusers_hook"), "hooks", {})
    return hooks.get(NAME)
