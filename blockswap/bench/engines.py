"""The engines to compare with, each under its own settings, as far as they are installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

# Makes a model in host memory run on a device; returns what undoes the effects outside the model.
Put = Callable[[nn.Module, torch.device, dict[str, Any]], Callable[[], None]]


@dataclass(frozen=True)
class Engine:
    """A way of running a model that lies in host memory.

    Attributes:
        name: as in the column ``engine`` of the results.
        package: what must be installed.
        put: see `Put`.
        settings: those that users choose between, one run for each.
    """

    name: str
    package: str
    put: Put
    settings: tuple[dict[str, Any], ...] = field(default=({},))

    @property
    def is_installed(self) -> bool:
        """Whether its package can be imported."""
        return importlib.util.find_spec(self.package) is not None


def _nothing() -> None:
    """Undo nothing."""


def _resident(model: nn.Module, device: torch.device, _: dict[str, Any]) -> Callable[[], None]:
    model.to(device)
    return _nothing


def _group_offload(
    model: nn.Module, device: torch.device, settings: dict[str, Any]
) -> Callable[[], None]:
    from diffusers.hooks import apply_group_offloading

    apply_group_offloading(model, onload_device=device, **settings)
    return _nothing


def _sequential(model: nn.Module, device: torch.device, _: dict[str, Any]) -> Callable[[], None]:
    import accelerate

    # As DiffusionPipeline.enable_sequential_cpu_offload calls it.
    accelerate.cpu_offload(model, device, offload_buffers=len(model._parameters) > 0)
    return _nothing


def _whole_model(model: nn.Module, device: torch.device, _: dict[str, Any]) -> Callable[[], None]:
    import accelerate

    accelerate.cpu_offload_with_hook(model, device)
    return _nothing


def _mmgp(model: nn.Module, _: torch.device, settings: dict[str, Any]) -> Callable[[], None]:
    from mmgp import offload  # it knows the current device alone

    try:
        manager = offload.all(
            {"transformer": model}, pinnedMemory=True, quantizeTransformer=False, **settings
        )
    except BaseException:
        torch.set_default_device(None)  # it sets its own for the whole process
        raise

    def undo() -> None:
        manager.release()
        torch.set_default_device(None)

    return undo


BLOCK = {"offload_type": "block_level", "num_blocks_per_group": 1}
LEAF = {"offload_type": "leaf_level"}
STREAM = {"use_stream": True}
RECORD = {"use_stream": True, "record_stream": True}

RESIDENT = Engine("resident", "torch", _resident)
PEERS = (
    Engine(
        "diffusers-block",
        "diffusers",
        _group_offload,
        (BLOCK | STREAM, BLOCK | RECORD),
    ),
    Engine("diffusers-leaf", "diffusers", _group_offload, (LEAF | STREAM, LEAF | RECORD)),
    Engine("accelerate-model", "accelerate", _whole_model),
    Engine("accelerate-sequential", "accelerate", _sequential),
    # Budgets in MB; half of it where transfers are asynchronous. 0: its own choice.
    Engine("mmgp", "mmgp", _mmgp, ({"budgets": 0}, {"budgets": 2000})),
)
NAMES = tuple(engine.name for engine in PEERS)
