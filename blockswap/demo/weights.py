"""Random weights that behave like trained ones: no NaN, no dead layer, the same for a seed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch

ALIGNMENT = 64  # PyTorch's own on a CPU


def random_module(
    make: Callable[[], torch.nn.Module], dtype: torch.dtype, device: torch.device, seed: int
) -> torch.nn.Module:
    """Builds `make()` on `device` in `dtype` and draws its weights there.

    Matrices are normal, scaled by row so that a unit input gives a unit output (nothing grows with
    depth, and nothing is flattered: such weights do not compress better than trained ones).
    """
    with default_dtype(dtype), torch.device(device):
        module = make()
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            _draw_(name, parameter, generator)
    return module.eval()


def _draw_(name: str, parameter: torch.nn.Parameter, generator: torch.Generator) -> None:
    if parameter.dim() >= 2:
        fan_in = parameter[0].numel()
        # A table of few rows ("scale_shift_table") is added to activations: it has no fan-in.
        is_table = "table" in name or name.endswith(("embedding", "embed_tokens.weight"))
        parameter.normal_(std=0.3 if is_table else fan_in**-0.5, generator=generator)
    elif name.endswith("bias"):
        parameter.normal_(std=0.05, generator=generator)
    else:
        parameter.normal_(mean=1.0, std=0.05, generator=generator)


def align(module: torch.nn.Module) -> None:
    """Moves weights that lie in a file's pages to memory of their own.

    There they begin wherever the file has them. A CPU's matrix-vector products then differ in the
    last bits from those of aligned weights, which images are.
    """
    for parameter in module.parameters():
        if parameter.device.type == "cpu" and parameter.data_ptr() % ALIGNMENT:
            parameter.data = parameter.detach().clone()


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make new tensors of this dtype meanwhile."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
