"""A model's blocks and bytes from its configuration alone: nothing is loaded, nothing runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from blockswap.blocks import find_blocks
from blockswap.components import is_network
from blockswap.demo.weights import default_dtype
from blockswap.errors import ConfigError
from blockswap.pieces import find_leaves
from blockswap.profile import Profile, ProfiledLeaf
from blockswap.request import ASSUMED_LINK_BYTES_PER_S

# What constructors raise for a configuration that does not fit them.
_UNFIT = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
DENOISERS = ("transformer", "unet", "prior", "controlnet")


def outline(path: Path, dtype: torch.dtype) -> Profile:
    """Return an untimed profile of the model in a diffusers folder.

    Args:
        path: a model's folder, with config.json, or a pipeline's, with model_index.json.
        dtype: of the weights.

    Raises:
        ConfigError: no such folder, an unknown class, a configuration that builds no model.
    """
    folder = _model_folder(path)
    config = _read(folder / "config.json")
    with torch.device("meta"), default_dtype(dtype):
        model = _build(folder, config)
    leaves = find_leaves(model, find_blocks(model), include_outside=False)
    streamable = sum(leaf.bytes for leaf in leaves.streamable)
    return Profile(
        model=type(model).__name__,
        device="not measured",
        blocks=leaves.blocks,
        leaves=[
            ProfiledLeaf(
                name=leaf.name,
                block=leaf.block,
                bytes=-(-leaf.bytes // 256) * 256,
                seconds=0.0,
                host_seconds=0.0,
            )
            for leaf in leaves.streamable
        ],
        fixed_bytes=sum(p.nbytes for p in model.parameters()) - streamable,
        link_bytes_per_s=ASSUMED_LINK_BYTES_PER_S,
    )


def _model_folder(path: Path) -> Path:
    if not path.is_dir():
        raise ConfigError(
            f"{path} is neither a profile nor a folder: give a diffusers folder with config.json or"
            " model_index.json (nothing is downloaded), or a file that Profile.save wrote"
        )
    if (path / "config.json").is_file():
        return path
    if not (path / "model_index.json").is_file():
        raise ConfigError(f"{path} holds neither config.json nor model_index.json")
    parts = _read(path / "model_index.json")
    there = {name: entry for name, entry in parts.items() if (path / name).is_dir()}
    found = [name for name in DENOISERS if name in there]
    found = found or [name for name, entry in there.items() if _is_network(entry)]
    if not found:
        raise ConfigError(
            f"{path} is a pipeline without a denoiser: it has {', '.join(sorted(parts))};"
            " give the folder of one of its models"
        )
    return path / found[0]


def _is_network(entry: object) -> bool:
    """Whether a pipeline's index names a denoiser's class here: first its library, then it."""
    if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[1], str):
        return False
    kind = getattr(_diffusers(), entry[1], None)
    return isinstance(kind, type) and is_network(kind)


def _diffusers() -> Any:
    try:
        import diffusers
    except ImportError:
        raise ConfigError("diffusers is missing: pip install blockswap[demo]") from None
    return diffusers


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except (ValueError, OSError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is no configuration: it holds a {type(content).__name__}")
    return content


def _build(folder: Path, config: dict[str, Any]) -> torch.nn.Module:
    diffusers = _diffusers()
    name = str(config.get("_class_name"))
    kind = getattr(diffusers, name, None)
    if kind is None or not hasattr(kind, "from_config"):
        raise ConfigError(f"{folder}: diffusers {diffusers.__version__} has no model {name!r}")
    try:
        model = kind.from_config(config)
    except _UNFIT as error:
        raise ConfigError(f"{folder}: {name} cannot be built: {error}") from None
    assert isinstance(model, torch.nn.Module)
    return model
