"""Four diffusion models with random weights, at their real sizes and at toy size.

The full configurations are the published ones (FLUX.1-dev, SDXL base, Wan2.1-T2V-14B, Qwen-Image),
so bytes, shapes and run time are real; no weight is downloaded. Weights are normal with
standard deviation 1/sqrt(fan-in), which keeps activations finite in bf16 at any depth; biases
and norms are random too, so that every parameter changes the output.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from blockswap.bench.zoo_configs import CLASSES, CONFIGS, KINDS, Config, Kind, Size

__all__ = ["KINDS", "Config", "Kind", "Size", "build", "build_meta", "make_inputs"]


def build_meta(kind: Kind, size: Size = "full", **overrides: Any) -> nn.Module:
    """Return the model on the meta device: shapes without memory, in fp32."""
    with torch.device("meta"):
        return _make(kind, size, overrides)


def build(
    kind: Kind,
    size: Size = "tiny",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
    *,
    draw_on: torch.device | str | None = None,
    **overrides: Any,
) -> nn.Module:
    """Return the model in eval mode with random weights, as a checkpoint would load.

    Args:
        kind: which model.
        size: "full" as published, or "tiny" (0.5 to 5 MiB, forward about 0.02 s).
        dtype: of the weights; what the class keeps in fp32 stays fp32 (3 tensors per Wan block).
        device: where the weights end.
        seed: the same seed on the same ``draw_on`` gives the same weights.
        draw_on: where the numbers are drawn: by default the CPU for "tiny", ``device`` for
            "full". A GPU draws a full model for the CPU in seconds instead of minutes.
        overrides: of the configuration, as in ``num_layers=4``.
    """
    source = torch.device(draw_on or ("cpu" if size == "tiny" else device))
    default_dtype = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with _parameters_on_meta():
            model = _make(kind, size, overrides)
    finally:
        torch.set_default_dtype(default_dtype)
    generator = torch.Generator(device=source).manual_seed(seed)
    in_fp32 = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    for name, parameter in list(model.named_parameters()):
        target = torch.float32 if in_fp32 & set(name.split(".")) else dtype
        values = _draw(name, parameter.shape, target, source, generator).to(device)
        owner = model.get_submodule(name.rpartition(".")[0])
        owner.register_parameter(name.rpartition(".")[2], nn.Parameter(values, requires_grad=False))
    for buffer_name, buffer in list(model.named_buffers()):
        owner = model.get_submodule(buffer_name.rpartition(".")[0])
        setattr(owner, buffer_name.rpartition(".")[2], buffer.to(device))
    return model.eval()


def make_inputs(
    kind: Kind,
    model: nn.Module | Config,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 1,
) -> dict[str, Any]:
    """Return the keyword arguments of one forward; ``model(**kwargs)[0]`` is the output tensor.

    Full-size shapes are those of the benchmarks: FLUX and Qwen-Image 1024x1024, SDXL 1024x1024
    with guidance (batch 2), Wan 480x832 with 81 frames. Numbers are drawn on the CPU, so that
    they are the same on every device.
    """
    config = model if isinstance(model, dict) else dict(model.config)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device=device, dtype=dtype)

    def number(value: float) -> torch.Tensor:
        return torch.tensor([value], device=device, dtype=dtype)

    kwargs = _INPUTS[kind](config, random, number)
    if isinstance(model, nn.Module):  # diffusers before 0.37 wants the lengths of the prompts too
        accepted = inspect.signature(model.forward).parameters
        if kind == "qwen" and "txt_seq_lens" in accepted:
            kwargs["txt_seq_lens"] = [kwargs["encoder_hidden_states"].shape[1]]
    return kwargs | {"return_dict": False}


def _flux_inputs(config: Config, random: Any, number: Any) -> dict[str, Any]:
    side, text = (64, 512) if _is_full(config) else (8, 12)
    image_ids = torch.zeros(side * side, 3)
    image_ids[:, 1] = torch.arange(side).repeat_interleave(side)
    image_ids[:, 2] = torch.arange(side).repeat(side)
    hidden_states = random(1, side * side, config["in_channels"])
    return {
        "hidden_states": hidden_states,
        "encoder_hidden_states": random(1, text, config["joint_attention_dim"]),
        "pooled_projections": random(1, config["pooled_projection_dim"]),
        "timestep": number(0.5),
        "guidance": number(3.5).float(),
        "img_ids": image_ids.to(hidden_states),
        "txt_ids": torch.zeros(text, 3).to(hidden_states),
    }


def _sdxl_inputs(config: Config, random: Any, number: Any) -> dict[str, Any]:
    side, text = config["sample_size"], 77
    pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    size = [8.0 * side, 8.0 * side, 0.0, 0.0, 8.0 * side, 8.0 * side]
    return {
        "sample": random(2, 4, side, side),
        "timestep": number(500.0).float(),
        "encoder_hidden_states": random(2, text, config["cross_attention_dim"]),
        "added_cond_kwargs": {
            "text_embeds": random(2, pooled),
            "time_ids": torch.stack([torch.cat([number(v) for v in size])] * 2),
        },
    }


def _wan_inputs(config: Config, random: Any, number: Any) -> dict[str, Any]:
    frames, height, width, text = (21, 60, 104, 512) if _is_full(config) else (2, 8, 12, 10)
    return {
        "hidden_states": random(1, config["in_channels"], frames, height, width),
        "timestep": number(500.0).float(),
        "encoder_hidden_states": random(1, text, config["text_dim"]),
    }


def _qwen_inputs(config: Config, random: Any, number: Any) -> dict[str, Any]:
    side, text = (64, 128) if _is_full(config) else (8, 12)
    hidden_states = random(1, side * side, config["in_channels"])
    return {
        "hidden_states": hidden_states,
        "encoder_hidden_states": random(1, text, config["joint_attention_dim"]),
        "encoder_hidden_states_mask": torch.ones(1, text, device=hidden_states.device).bool(),
        "timestep": number(0.5),
        "img_shapes": [[(1, side, side)]],
    }


_INPUTS: dict[str, Callable[[Config, Any, Any], dict[str, Any]]] = {
    "flux": _flux_inputs,
    "sdxl": _sdxl_inputs,
    "wan": _wan_inputs,
    "qwen": _qwen_inputs,
}


def _is_full(config: Config) -> bool:
    return bool(config["num_attention_heads"] * config["attention_head_dim"] >= 1024)


def _make(kind: Kind, size: Size, overrides: Config) -> nn.Module:
    import diffusers  # slow to import, and only needed here

    model: nn.Module = getattr(diffusers, CLASSES[kind])(**CONFIGS[kind, size]() | overrides)
    return model


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Make parameters without memory, while buffers and tables get their real values."""
    register = nn.Module.register_parameter

    def register_on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
        register(self, name, param)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _draw(
    name: str,
    shape: torch.Size,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
) -> torch.Tensor:
    values = torch.randn(shape, dtype=dtype, device=device, generator=generator)
    if name.endswith("scale_shift_table"):
        return values.mul_(1 / math.sqrt(shape[-1]))
    if len(shape) > 1:
        return values.mul_(1 / math.sqrt(math.prod(shape[1:])))
    return values.mul_(0.05).add_(1.0 if name.endswith(".weight") else 0.0)
