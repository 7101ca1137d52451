"""Refuse what cannot be attached, before anything is changed."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from blockswap.casting import cast_of
from blockswap.errors import ConfigError, UnsupportedError, UseError

_PLAIN_TENSORS = (torch.Tensor, nn.Parameter)


def require_module(model: object) -> None:
    """Refuse what is not a model.

    Raises:
        ConfigError: not an nn.Module.
    """
    if isinstance(model, nn.Module):
        return
    what = "class" if inspect.isclass(model) else "object"
    kind = model.__name__ if inspect.isclass(model) else type(model).__name__
    raise ConfigError(
        f"got the {what} {kind}; accepted: a diffusers pipeline, or a torch.nn.Module such as"
        " pipe.transformer"
    )


def refuse_grad(model: nn.Module, needed: bool, inputs: Iterable[object]) -> None:
    """Refuse a forward whose weights autograd would read again later.

    Args:
        model: for its name.
        needed: whether a streamed parameter requires grad.
        inputs: of the forward.

    Raises:
        UseError: a parameter or an input requires grad.
    """
    if needed or any(isinstance(v, torch.Tensor) and v.requires_grad for v in inputs):
        raise UseError(
            f"{type(model).__name__} runs with grad mode on and tensors that require grad;"
            " streamed weights are gone when backward would read them: use torch.no_grad() or"
            " torch.inference_mode(), or model.requires_grad_(False)"
        )


def check_attachable(model: object) -> None:
    """Refuse a model whose weights cannot be moved, or which something else moves already.

    Raises:
        ConfigError: not a module, no parameters, offloaded by accelerate or diffusers, weights on
            the meta device, not yet shaped, on several devices, or made under inference mode.
        UnsupportedError: quantised or other tensor subclasses, a model that is cast as a whole.
    """
    require_module(model)
    assert isinstance(model, nn.Module)
    _refuse_accelerate(model)
    refuse_group_offloading(model)
    refuse_whole_casts(model)
    check_weights(model, on_one_device=True)


def check_weights(model: nn.Module, on_one_device: bool = False) -> None:
    """Refuse a model whose weights are none that can be moved.

    Args:
        model: it.
        on_one_device: whether they must lie together.

    Raises:
        ConfigError: no parameters, on the meta device, not yet shaped, made under inference mode,
            or on several devices.
        UnsupportedError: quantised or other tensor subclasses.
    """
    parameters = dict(model.named_parameters())
    if not parameters:
        raise ConfigError(
            f"{type(model).__name__} holds no parameters, so there is nothing to swap"
        )
    _refuse_meta(parameters)
    refuse_inference(parameters)
    if on_one_device:
        _refuse_several_devices(parameters)
    _refuse_subclasses(model)


def _refuse_accelerate(model: nn.Module) -> None:
    for name, module in model.named_modules():
        for hook in _accelerate_hooks(getattr(module, "_hf_hook", None)):
            moves = type(hook).__name__ == "CpuOffload" or bool(getattr(hook, "offload", False))
            if moves:
                where = f"module {name!r}" if name else "the model"
                raise ConfigError(
                    f"accelerate offloads {where} ({type(hook).__name__}): two owners of one weight"
                    " give wrong values. Call pipe.remove_all_hooks(), or"
                    " accelerate.hooks.remove_hook_from_module(model, recurse=True), first"
                )
    device_map = getattr(model, "hf_device_map", None)
    if isinstance(device_map, dict) and len(places := {str(d) for d in device_map.values()}) > 1:
        raise ConfigError(
            f"the model was loaded with a device_map over {', '.join(sorted(places))}:"
            " load it without device_map; blockswap places the weights itself"
        )


def _accelerate_hooks(hook: Any) -> Iterator[Any]:
    if hook is not None:
        yield hook
        for inner in getattr(hook, "hooks", ()):  # SequentialHook
            yield from _accelerate_hooks(inner)


def refuse_group_offloading(model: nn.Module, component: str | None = None) -> None:
    """Refuse a model whose weights diffusers moves.

    Args:
        model: it.
        component: its name if it is one of a pipeline.

    Raises:
        ConfigError: it does.
    """
    for name, module in model.named_modules():
        hooks = getattr(getattr(module, "_diffusers_hook", None), "hooks", None)
        if not isinstance(hooks, dict):
            continue
        where = component or (f"module {name!r}" if name else "the model")
        for hook_name, hook in hooks.items():
            if type(hook).__module__.partition(".")[0] == "blockswap":
                continue  # our own shim goes by diffusers' name
            if "group_offloading" in hook_name:
                raise ConfigError(
                    f"diffusers group offloading is enabled on {where} and cannot be switched off"
                    " cleanly: load the model again without enable_group_offload"
                )


def refuse_whole_casts(model: nn.Module) -> None:
    """Refuse a hook that casts more than one leaf: all of that would be on the device at once.

    Raises:
        UnsupportedError: there is one.
    """
    for name, module in model.named_modules():
        holds_others = any(inner._parameters for inner in module.modules() if inner is not module)
        if cast_of(module) is not None and holds_others:
            where = f"module {name!r}" if name else "the model"
            raise UnsupportedError(
                f"layerwise casting of {where} as a whole is not supported: each forward would"
                " replace all of its weights at once; load the model again and call"
                " model.enable_layerwise_casting(), which casts leaf by leaf"
            )


def note_detached(error: BaseException) -> None:
    """Say of an error that ended a session what to do."""
    if hasattr(error, "add_note"):  # Python 3.11
        error.add_note("the session is detached: free memory and call blockswap.attach again")


def edited_in_forward(names: list[str]) -> UseError:
    """Return the error for weights that a forward changed."""
    first = ", ".join(names[:3])
    return UseError(
        f"{first} changed during a forward; such a change would be lost: edit weights between"
        " forwards, or call session.pause() first"
    )


def _refuse_meta(parameters: dict[str, nn.Parameter]) -> None:
    lazy = [n for n, p in parameters.items() if isinstance(p, nn.UninitializedParameter)]
    if lazy:
        raise ConfigError(
            f"{len(lazy)} parameters have no shape yet, the first is {lazy[0]!r}: run the model"
            " once, then attach"
        )
    meta = [n for n, p in parameters.items() if p.is_meta]
    if meta:
        raise ConfigError(
            f"{len(meta)} of {len(parameters)} parameters are on the meta device and hold no"
            f" values, the first is {meta[0]!r}: load the weights before attaching"
        )


def refuse_inference(tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse tensors whose edits PyTorch does not count.

    Args:
        tensors: by the names that the error gives.

    Raises:
        ConfigError: there are some.
    """
    made = [name for name, tensor in tensors.items() if not _counts_edits(tensor)]
    if made:
        raise ConfigError(
            f"{len(made)} of {len(tensors)} tensors were made under torch.inference_mode(),"
            f" the first is {made[0]!r}: PyTorch does not count edits of such tensors; make or load"
            " the model outside of it, and call it there"
        )


def _counts_edits(tensor: torch.Tensor) -> bool:
    """Whether PyTorch counts edits: also of one that was only moved or cast in inference mode."""
    try:
        return tensor._version >= 0
    except RuntimeError:
        return False


def _refuse_several_devices(parameters: dict[str, nn.Parameter]) -> None:
    counts = Counter(str(p.device) for p in parameters.values())
    if len(counts) > 1:
        places = ", ".join(f"{count} on {device}" for device, count in counts.items())
        minority = min(counts, key=counts.__getitem__)
        first = next(n for n, p in parameters.items() if str(p.device) == minority)
        raise ConfigError(
            f"the parameters lie on several devices: {places} (such as {first!r}):"
            ' move them together first, for example model.to("cpu")'
        )


def _refuse_subclasses(model: nn.Module) -> None:
    tensors: list[tuple[str, torch.Tensor]] = [*model.named_parameters(), *model.named_buffers()]
    for name, tensor in tensors:
        if type(tensor) not in _PLAIN_TENSORS:
            kind = f"{type(tensor).__name__} ({type(tensor).__module__})"
        elif tensor.is_quantized or tensor.layout is not torch.strided:
            kind = f"a tensor of layout {tensor.layout}, dtype {tensor.dtype}"
        else:
            continue
        raise UnsupportedError(
            f"{name!r} is {kind}: quantised weights and other tensor subclasses are not supported"
            " yet; load the model with ordinary weights, such as torch_dtype=torch.bfloat16"
        )
