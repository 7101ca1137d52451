"""The components of a diffusers pipeline: what streams each step, what once, what comes whole."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from blockswap.binding import weights_of
from blockswap.blocks import find_blocks
from blockswap.config import SwapConfig
from blockswap.device_memory import DeviceMemory
from blockswap.errors import CapError, ConfigError, UseError
from blockswap.guests import CALLS, Guest
from blockswap.pieces import find_leaves
from blockswap.preflight import refuse_group_offloading, refuse_inference
from blockswap.sizes import format_bytes

# A combined pipeline has a prior_prior, and beside it a prior_text_encoder, which is none.
DENOISER = re.compile(r"((unconditional_)?transformer|unet|prior|prior_prior)(_\d+)?|controlnet.*")
# Where no name tells, the class does, which diffusers keeps here: a `decoder` may be a VAE's.
NETWORKS = (
    "diffusers.models.controlnets.",
    "diffusers.models.transformers.",
    "diffusers.models.unets.",
    "diffusers.pipelines.deprecated.wuerstchen.modeling_wuerstchen_",
)
# Nobody calls these, whatever their name: their weights, or parts of them, are in another model.
DONORS = ("ControlNetXSAdapter", "MotionAdapter", "UNetFlatConditionModel")
# A component with more weights than this streams: whole, it would not compute before all of it has
# come, and take room from weights that are used in every step.
MOST_WHOLE_BYTES = 2 * 2**30
# Of the memory for all, without what a script holds: more streams as well, so that its activations
# find room.
MOST_WHOLE_SHARE = 0.75


def is_pipeline(model: object) -> bool:
    """Whether this is a diffusers pipeline: something with components that is no module."""
    components = getattr(model, "components", None)
    return not isinstance(model, (nn.Module, type)) and isinstance(components, dict)


def is_network(kind: type) -> bool:
    """Whether it is, or is made from, a class that diffusers keeps with its denoisers."""
    homes = (cls.__module__ for cls in kind.__mro__)
    return not is_donor(kind) and any(home.startswith(NETWORKS) for home in homes)


def is_donor(kind: type) -> bool:
    """Whether it is, or is made from, a class that only lends weights to another model."""
    return any(cls.__name__ in DONORS for cls in kind.__mro__)


def denoisers_of(pipe: Any, known: Collection[nn.Module] = ()) -> dict[str, nn.Module]:
    """Return the models of a pipeline that run each step, by name; each module once.

    They share the cap. A network beside them whose name does not tell is none: those of UnCLIP have
    the device one after the other, and a share would be little for what they compute.

    Args:
        pipe: the pipeline.
        known: those that are streamed as such already.
    """
    models = {
        name: part
        for name, part in pipe.components.items()
        if isinstance(part, nn.Module) and not is_donor(type(part))
    }
    chosen = {n: p for n, p in models.items() if DENOISER.fullmatch(n) or p in known} or {
        n: p
        for n, p in models.items()
        if is_network(type(p)) and can_stream(p, include_outside=False)
    }
    found: dict[str, nn.Module] = {}
    for name, part in chosen.items():
        nets = getattr(part, "nets", None)  # several ControlNets in one
        parts = {f"{name}.nets.{i}": net for i, net in enumerate(nets)} if nets else {name: part}
        found |= {n: p for n, p in parts.items() if all(p is not other for other in found.values())}
    return found


@dataclass(frozen=True)
class Components:
    """How a pipeline's components share the device.

    Attributes:
        denoisers: stream in each step, and share the cap.
        visitors: stream, too, but run once or twice a call, each with the cap for itself.
        guests: come whole for their turn.
        configs: of denoisers and visitors.
        donors: nobody calls; they stay where they are.
    """

    denoisers: dict[str, nn.Module]
    visitors: dict[str, nn.Module]
    guests: list[Guest]
    configs: dict[str, SwapConfig]
    donors: list[nn.Module]

    @classmethod
    def of(cls, pipe: Any, config: SwapConfig, before: Components | None = None) -> Components:
        """Sort them.

        Args:
            pipe: the pipeline.
            config: the cap for all of them, and the options of each.
            before: how they were sorted; what is still there keeps its place and its share.

        Raises:
            ConfigError: nothing runs each step, two denoisers share a module, a component is
                offloaded otherwise, or one was made under inference mode.
            CapError: a component that cannot stream does not fit under the cap.
            UseError: a denoiser more would need a share of the cap.
        """
        known = cls({}, {}, [], {}, []) if before is None else before
        denoisers = denoisers_of(pipe, known.denoisers.values())
        if not denoisers:
            raise ConfigError(_nothing_streams(pipe))
        _refuse_shared(denoisers)
        memory = DeviceMemory(config.target_device())
        cap = config.resolve(memory.total_bytes()).vram_bytes
        ours = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
        room = memory.available_bytes() if cap is None else cap - memory.held_bytes(ours)
        if before is not None and cap is not None and (more := denoisers.keys() - known.denoisers):
            raise UseError(
                f"pipe.{min(more)} would share the cap with what is attached: call"
                " session.detach(), set it, and attach again"
            )
        device, pins = config.target_device(), config.host_memory is None
        for name, module in denoisers.items():
            if module not in known.denoisers.values():
                _refuse_inference(name, module)
        staying = {guest.module: guest for guest in known.guests}
        guests: list[Guest] = []
        donors: list[nn.Module] = []
        visitors: dict[str, nn.Module] = {}
        for name, module in _others_of(pipe, set(denoisers.values())).items():
            if is_donor(type(module)):
                donors.append(module)
                continue
            if module in known.visitors.values():
                visitors[name] = module
                continue
            if module not in staying and device.type != "cpu":  # there it would not move
                _refuse_inference(name, module, with_buffers=True)
            guest = staying.get(module) or Guest(name, module, device, pins)
            if before is not None and module not in staying:
                guest.go_home()  # diffusers takes our device for the pipeline's, and loads to it
            if module in staying or guest.weight_bytes <= _most_whole_bytes(room):
                guests.append(guest)
            elif can_stream(module):
                _refuse_inference(name, module)
                visitors[name] = module
            elif cap is not None and guest.num_bytes > cap:
                raise CapError(
                    f"pipe.{name} has {format_bytes(guest.num_bytes)} of weights and"
                    f" computes as a whole, but the cap is {format_bytes(cap)}: raise vram to at"
                    f" least {guest.num_bytes} bytes, or attach pipe.{next(iter(denoisers))} alone"
                )
            else:
                guests.append(guest)
        configs = {
            name: dataclasses.replace(config, vram=share)
            for name, share in _shares(cap, denoisers).items()
        } | {name: _once(config, cap, module) for name, module in visitors.items()}
        same = {name for name, part in visitors.items() if part is known.visitors.get(name)}
        kept = known.denoisers.keys() & denoisers.keys() | same
        configs |= {name: known.configs[name] for name in kept}
        return cls(denoisers, visitors, guests, configs, donors)

    @property
    def modules(self) -> list[nn.Module]:
        """Return all of them."""
        whole = [guest.module for guest in self.guests]
        return [*self.denoisers.values(), *self.visitors.values(), *whole, *self.donors]


def _most_whole_bytes(room: int | None) -> int:
    """Return the weights with which a component still comes whole; None: nobody knows the room."""
    share = MOST_WHOLE_BYTES if room is None else int(MOST_WHOLE_SHARE * room)
    return min(MOST_WHOLE_BYTES, share)


def _nothing_streams(pipe: Any) -> str:
    parts = [n for n, part in pipe.components.items() if isinstance(part, nn.Module)]
    way_out = f"pass one of its models itself: {', '.join(f'pipe.{n}' for n in parts)}"
    return (
        f"{type(pipe).__name__} has no transformer, unet or controlnet to stream"
        f" ({way_out if parts else 'it has no model at all'})"
    )


def _refuse_shared(models: dict[str, nn.Module]) -> None:
    """Refuse a module of two models: the session of one would take the other's fetch for an edit.

    Modules that share a parameter, and no more, are tied weights: each session knows of it.
    """
    known: dict[nn.Module, tuple[str, str]] = {}
    for name, model in models.items():
        for path, module in model.named_modules(prefix=f"pipe.{name}"):
            if module not in known:
                known[module] = name, path
            elif (theirs := known[module])[0] != name and any(map(weights_of, module.modules())):
                part = f"pipe.{name.partition('.')[0]}"
                raise ConfigError(
                    f"{theirs[1]} and {path} are one module, and two models cannot stream it: give"
                    f" one of them its own, such as {part} = copy.deepcopy({part})"
                )


def _refuse_inference(name: str, module: nn.Module, with_buffers: bool = False) -> None:
    tensors: dict[str, torch.Tensor] = dict(module.named_parameters(f"pipe.{name}"))
    if with_buffers:
        tensors |= module.named_buffers(f"pipe.{name}")
    refuse_inference(tensors)


def _once(config: SwapConfig, cap: int | None, module: nn.Module) -> SwapConfig:
    """Return the settings of what runs once a call, and gains nothing from weights that stay."""
    return dataclasses.replace(
        config,
        vram=cap,
        offload=f"{sum(p.nbytes for p in module.parameters())}B",
        mode="layerwise",
        priorities=None,
        blocks=None,
        swap_space=None,
    )


def _others_of(pipe: Any, streamed: set[nn.Module]) -> dict[str, nn.Module]:
    others: dict[str, nn.Module] = {}
    for name, part in pipe.components.items():
        if not isinstance(part, nn.Module) or part in streamed or getattr(part, "nets", None):
            continue
        if all(part is not other for other in others.values()):
            if hasattr(part, "_hf_hook"):
                raise ConfigError(
                    f"accelerate offloads pipe.{name}: call pipe.remove_all_hooks() first"
                )
            refuse_group_offloading(part, f"pipe.{name}")
            others[name] = part
    return others


def can_stream(module: nn.Module, include_outside: bool = True) -> bool:
    """Whether it has blocks, and is called as a module: a VAE's `decode` passes its forward by.

    Args:
        module: a component.
        include_outside: whether what lies outside its blocks may stream as well.
    """
    if any(hasattr(type(module), name) for name in CALLS if name != "forward"):
        return False
    try:
        leaves = find_leaves(module, find_blocks(module), include_outside)
    except ConfigError:
        return False
    return bool(leaves.streamable)


def entrances(model: nn.Module, is_denoiser: bool) -> Iterator[nn.Module]:
    """Yield where a component may be entered: parts of text encoders are called alone, too."""
    yield model
    if not is_denoiser:
        for module in model.modules():
            if module is not model and weights_of(module):
                yield module


def _shares(cap: int | None, models: dict[str, nn.Module]) -> dict[str, int | None]:
    """Return each denoiser's part of the cap, in proportion to its weights."""
    if cap is None:
        return dict.fromkeys(models)
    sizes = {n: sum(p.nbytes for p in model.parameters()) for n, model in models.items()}
    return {name: cap * size // sum(sizes.values()) for name, size in sizes.items()}
