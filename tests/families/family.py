"""What a family is: one denoiser class at toy size, with weights and inputs for a forward."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from blockswap.demo.weights import default_dtype

Inputs = dict[str, Any]
_SMALL = 0.1  # of weights that a class leaves at zero, so that every block counts


@dataclass(frozen=True)
class Family:
    """A class of diffusers, a small configuration of it, and what its forward takes."""

    name: str
    cls_name: str
    config: dict[str, Any]
    inputs: Callable[[torch.dtype, str], Inputs]


class Draw:
    """The inputs of one forward, drawn on the CPU: the same numbers on every device."""

    def __init__(self, dtype: torch.dtype, device: str) -> None:
        self.dtype = dtype
        self.device = device
        self._generator = torch.Generator().manual_seed(1)

    def __call__(self, *shape: int) -> torch.Tensor:
        """Return normal numbers."""
        values = torch.randn(shape, generator=self._generator)
        return values.to(device=self.device, dtype=self.dtype)

    def floats(self, *values: float) -> torch.Tensor:
        """Return these values, in the dtype of the weights."""
        return torch.tensor(values, device=self.device, dtype=self.dtype)

    def times(self, *values: float) -> torch.Tensor:
        """Return these values in fp32, as a scheduler gives its timesteps."""
        return torch.tensor(values, device=self.device)

    def ints(self, *values: int) -> torch.Tensor:
        """Return these integers."""
        return torch.tensor(values, device=self.device)

    def below(self, limit: int, *shape: int) -> torch.Tensor:
        """Return integers from 0 to ``limit - 1``."""
        return torch.randint(limit, shape, generator=self._generator).to(self.device)

    def true(self, *shape: int) -> torch.Tensor:
        """Return a mask that hides nothing."""
        return torch.ones(shape, device=self.device, dtype=torch.bool)

    def ones(self, *shape: int) -> torch.Tensor:
        """Return ones in the dtype of the weights: a mask of the older kind."""
        return torch.ones(shape, device=self.device, dtype=self.dtype)

    def zeros(self, *shape: int) -> torch.Tensor:
        """Return zeros: the positions of text tokens."""
        return torch.zeros(shape, device=self.device)

    def grid(self, *sizes: int, axes: int = 3) -> torch.Tensor:
        """Return the position of each token of a grid: its sizes' axes are the last of ``axes``."""
        ranges = [torch.arange(size) for size in (*[1] * (axes - len(sizes)), *sizes)]
        positions = torch.cartesian_prod(*ranges).reshape(-1, axes)
        return positions.to(device=self.device, dtype=torch.float32)


def family(
    name: str, cls_name: str, config: dict[str, Any], draw_inputs: Callable[[Draw], Inputs]
) -> Family:
    """Return a family whose inputs are written as a function of a `Draw`."""
    return Family(name, cls_name, config, lambda dtype, device: draw_inputs(Draw(dtype, device)))


def class_of(each: Family) -> type[nn.Module]:
    """Return the class of a family."""
    import diffusers  # slow to import

    found: type[nn.Module] = getattr(diffusers, each.cls_name)
    return found


def build_meta(each: Family) -> nn.Module:
    """Return the model on the meta device: shapes without memory."""
    with torch.device("meta"):
        return class_of(each)(**each.config)


def build(each: Family, dtype: torch.dtype) -> nn.Module:
    """Return the model as a checkpoint of this dtype would load; equal calls give equal weights.

    What the class keeps in fp32 is fp32. Weights that the class leaves at zero or without a value
    are small random numbers.
    """
    with torch.random.fork_rng(devices=[]), default_dtype(dtype), _empty_is_nan():
        torch.manual_seed(0)
        model = class_of(each)(**each.config)
        for parameter in model.parameters():
            if not parameter.any() or not parameter.isfinite().all():
                nn.init.normal_(parameter, std=_SMALL)
    in_fp32 = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(torch.float32 if in_fp32 & set(name.split(".")) else dtype)
    return model.requires_grad_(False).eval()


@torch.no_grad()
def outputs(model: nn.Module, inputs: Inputs) -> list[torch.Tensor]:
    """Return every tensor of the output of one forward."""
    return list(_tensors(model(**inputs)))


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of all parameters."""
    return sum(math.prod(p.shape) * p.element_size() for p in model.parameters())


def denoiser_classes() -> dict[str, type[nn.Module]]:
    """Return every model class of diffusers that denoises, or declares how it may be split."""
    import importlib
    import pkgutil

    import diffusers.models
    from diffusers.models.modeling_utils import ModelMixin

    found: dict[str, type[nn.Module]] = {}
    for entry in pkgutil.walk_packages(diffusers.models.__path__, "diffusers.models."):
        if entry.name.endswith("_flax") or entry.ispkg:
            continue
        module = importlib.import_module(entry.name)
        for name, value in vars(module).items():
            if not inspect.isclass(value) or value.__module__ != entry.name:
                continue
            if not issubclass(value, ModelMixin):
                continue
            of_denoisers = {"transformers", "unets", "controlnets"} & set(entry.name.split("."))
            if of_denoisers or getattr(value, "_no_split_modules", None):
                found[name] = value
    return found


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(tuple(value.values()))
    elif isinstance(value, (tuple, list)):
        for member in value:
            yield from _tensors(member)


@contextlib.contextmanager
def _empty_is_nan() -> Iterator[None]:
    """Make `torch.empty` give NaN, so that parameters nobody initialises are recognised."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
