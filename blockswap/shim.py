"""How diffusers sees a streamed model: as one under group offloading.

One hook on the root module under diffusers' own name makes `pipe._execution_device` and
`model.device` tell the device, and makes `pipe.to()` and `enable_model_cpu_offload()` keep their
hands off. LoRA loaders take the hook off and apply group offloading again with its config: that one
function is wrapped, so that ours comes back instead. Group offloading itself is refused there: the
weights would have two owners.
"""

from __future__ import annotations

import functools
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook, group_offloading
from torch import nn

from blockswap.attached import held_with
from blockswap.errors import ConfigError

NAME = "group_offloading"

_given_a_registry: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@dataclass(frozen=True)
class ShimConfig:
    """What diffusers reads of a group offloading hook's config: where the model computes."""

    onload_device: torch.device


class Shim(ModelHook):  # type: ignore[misc]  # diffusers is untyped
    """Does nothing to a forward; is there to be found."""

    def __init__(self, config: ShimConfig) -> None:
        super().__init__()
        self.config = config

    def deinitalize_hook(self, module: nn.Module) -> nn.Module:  # sic
        """Repair what the registry has just done to the hook above: a cache would be off, untold.

        It writes the forward below ours where that hook calls its own.
        """
        registry: Any = module._diffusers_hook
        above = registry._hook_order.index(NAME) + 1
        if above < len(registry._fn_refs):
            calls = registry._fn_refs[above]
            if calls.original_forward is not None:
                hook = registry.hooks[registry._hook_order[above]]
                calls.original_forward = calls.forward
                calls.forward = functools.partial(hook.new_forward, module)
        return module


def register(model: nn.Module, config: ShimConfig) -> None:
    """Put the shim on a model."""
    watch_group_offloading()
    if "_diffusers_hook" not in model.__dict__:
        _given_a_registry.add(model)
    registry = HookRegistry.check_if_exists_or_initialize(model)
    if registry.get_hook(NAME) is None:
        registry.register_hook(Shim(config), NAME)


def remove(model: nn.Module) -> None:
    """Take the shim off, and the registry with it when it came with the shim."""
    registry = model.__dict__.get("_diffusers_hook")
    if registry is None or not isinstance(registry.get_hook(NAME), Shim):
        return
    registry.remove_hook(NAME, recurse=False)
    forward = model.__dict__.get("forward")
    if getattr(forward, "__func__", None) is type(model).forward:
        del model.forward  # the registry left the class's own method on the instance
    if model in _given_a_registry and not registry.hooks:
        del model._diffusers_hook
    _given_a_registry.discard(model)


def watch_group_offloading() -> None:
    """Put ours in the place of diffusers' function, for good: every way to it ends there."""
    original = group_offloading._apply_group_offloading
    if getattr(original, "knows_blockswap", False):
        return

    @functools.wraps(original)
    def apply(module: nn.Module, config: Any) -> None:
        if isinstance(config, ShimConfig):
            register(module, config)
        elif (held := held_with(module)) is not None:
            raise ConfigError(
                f"blockswap moves the weights of {type(held).__name__}: two owners of one weight"
                " give wrong values. Do without group offloading, or call session.detach() first"
            )
        else:
            original(module, config)

    apply.knows_blockswap = True  # type: ignore[attr-defined]
    group_offloading._apply_group_offloading = apply
