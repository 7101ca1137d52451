"""The one line that users write."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Collection
from types import FrameType
from typing import Any, overload

from torch import nn

from blockswap.attached import KEY, session_of
from blockswap.blocks import find_blocks
from blockswap.components import Components, is_pipeline
from blockswap.config import SwapConfig
from blockswap.errors import ConfigError, UseError
from blockswap.exchange import attached
from blockswap.feasible import check_plannable
from blockswap.pipeline import PipelineSession
from blockswap.preflight import check_attachable
from blockswap.session import Session
from blockswap.together import Together, members_of, name_of

Size = int | float | str


@overload
def attach(
    model: nn.Module,
    *others: nn.Module | Size | None,
    vram: Size | None = None,
    config: SwapConfig | None = None,
    **options: Any,
) -> Session: ...


@overload
def attach(
    model: Any,
    *others: Any,
    vram: Size | None = None,
    config: SwapConfig | None = None,
    **options: Any,
) -> Session | PipelineSession: ...


def attach(
    model: Any,
    *others: Any,
    vram: Size | None = None,
    config: SwapConfig | None = None,
    **options: Any,
) -> Session | PipelineSession:
    """Keep part of a model on the device and stream the rest, bit-identical.

    The weights move to pinned host memory, everything outside the blocks to the device. The first
    forwards learn order and times (`Session.state` is "learning"), then the plan is settled.

    Args:
        model: with weights in memory, on the CPU or a device; any module whose blocks are found.
            Or a diffusers pipeline: its denoisers stream, each other component moves to the device
            whole for its turn and back.
        others: further models that run behind it in each step, in this order: all of them share the
            cap and stream in one cycle. Or ``vram``.
        vram: hard cap on device memory, as in `SwapConfig`; None: what is free.
        config: all settings at once, instead of ``vram`` and options.
        options: the other fields of `SwapConfig`.

    Returns:
        The session, a `PipelineSession` for a pipeline. Attaching again with the same settings
        returns the live one.

    Raises:
        ConfigError: a wrong option, no blocks, meta weights, a model that is offloaded otherwise,
            or one that has a module in common with a model of another session.
        CapError: the cap is below the smallest possible plan.
        UseError: a forward of the model runs, or it is attached with other settings.

    >>> import torch, blockswap
    >>> layers = [torch.nn.Linear(256, 256) for _ in range(4)]
    >>> model = torch.nn.Sequential(*layers).requires_grad_(False)
    >>> session = blockswap.attach(model, device="cpu", offload=2)
    >>> y = model(torch.ones(1, 256))
    >>> session.detach()
    """
    if len(others) == 1 and not isinstance(others[0], nn.Module) and not is_pipeline(others[0]):
        if vram is not None:
            raise ConfigError("vram is given twice, by place and by name")
        (vram,), others = others, ()
    if config is None:
        config = SwapConfig.from_kwargs(vram=vram, **options)
    elif vram is not None or options:
        raise ConfigError("give either config= or options, not both")
    if others:
        return _attach_models([model, *others], config)
    if is_pipeline(model):
        return _attach_pipeline(model, config)
    return _attach_model(model, config)


def _attach_model(model: Any, config: SwapConfig, leaving: Collection[nn.Module] = ()) -> Session:
    """Attach one model; ``leaving``: others that may be on the device now, and then are not."""
    return _attach_models([model], config, leaving)


def _attach_models(
    models: list[Any], config: SwapConfig, leaving: Collection[nn.Module] = ()
) -> Session:
    if len(models) > 1 and any(is_pipeline(model) for model in models):
        raise ConfigError("a pipeline is attached alone: its denoisers share nothing with others")
    live = [session_of(model) if isinstance(model, nn.Module) else None for model in models]
    if any(session is not None for session in live):
        return _same(models, live, config)
    for model in models:
        check_attachable(model)
        _refuse_running(model)
    _refuse_nested(models)
    whole = models[0] if len(models) == 1 else Together(models)
    blocks = find_blocks(whole, config.blocks)
    check_plannable(whole, blocks, config, leaving=leaving)
    if "diffusers" in sys.modules:  # we import it for nobody: that takes seconds
        with contextlib.suppress(ImportError):  # old ones have no group offloading
            from blockswap import shim

            shim.watch_group_offloading()
    return Session(whole, config, blocks)


def _refuse_nested(models: list[nn.Module]) -> None:
    for index, model in enumerate(models):
        inside = set(model.modules())
        for other in models[:index] + models[index + 1 :]:
            if other in inside:
                raise ConfigError(
                    f"{type(other).__name__} is given twice, or is part of {type(model).__name__}:"
                    " give each model once"
                )


def _same(models: list[Any], sessions: list[Session | None], config: SwapConfig) -> Session:
    live = next(session for session in sessions if session is not None)
    members = list(members_of(live.model).values())
    if len(members) != len(models) or any(a is not b for a, b in zip(members, models, strict=True)):
        raise UseError(
            f"{name_of(live.model)} is attached already, and not as it is asked for now: call"
            " session.detach() first"
        )
    different = live.config.differences(config)
    if different:
        raise UseError(
            f"{name_of(live.model)} is attached with other settings"
            f" ({', '.join(different)} differ): call session.detach() first"
        )
    live.resume()
    return live


def _refuse_running(model: nn.Module) -> None:
    """Refuse when any thread is inside a forward of the model: its weights are in use."""
    for frame in sys._current_frames().values():
        walk: FrameType | None = frame
        while walk is not None:
            if walk.f_code.co_name == "_call_impl" and walk.f_locals.get("self") is model:
                raise UseError(
                    f"a forward of {type(model).__name__} runs: attach before or after it"
                )
            walk = walk.f_back


def _attach_pipeline(pipe: Any, config: SwapConfig) -> PipelineSession:
    """Attach every denoiser of a pipeline; nothing stays attached when one is refused.

    Args:
        pipe: a diffusers pipeline.
        config: as for one model; denoisers share ``vram`` by their weights.

    Raises:
        ConfigError: nothing to stream, or as for one model.
        CapError: another component does not fit under ``vram``.
        UseError: it is attached with other settings.
    """
    live = pipe.__dict__.get(KEY)
    if isinstance(live, PipelineSession) and live.state == "detached":
        live.detach()  # what is left of it
    elif isinstance(live, PipelineSession):
        if different := live.config.differences(config):
            raise UseError(
                f"{type(pipe).__name__} is attached with other settings"
                f" ({', '.join(different)} differ): call session.detach() first"
            )
        live.resume()
        return live
    parts = Components.of(pipe, config)
    with attached(parts, _attach_model) as sessions:
        return PipelineSession(pipe, config, sessions, parts, _attach_model)
