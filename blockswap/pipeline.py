"""Pipelines: the denoisers stream, every other component takes turns on the device."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from blockswap.config import SwapConfig
from blockswap.device_memory import DeviceMemory
from blockswap.errors import CapError, ConfigError, UseError
from blockswap.guests import Guest
from blockswap.history import MemoryHistory, Recorder, recording
from blockswap.pipeline_report import PipelineReport
from blockswap.report import State
from blockswap.session import Session
from blockswap.sizes import format_bytes
from blockswap.turns import Turns

DENOISERS = ("transformer", "unet", "controlnet", "prior")  # and what begins so: transformer_2
KEY = "_blockswap_session"
CALL_END = "maybe_free_model_hooks"  # what every diffusers pipeline calls last


def is_pipeline(model: object) -> bool:
    """Whether this is a diffusers pipeline: something with components that is no module."""
    components = getattr(model, "components", None)
    return not isinstance(model, (nn.Module, type)) and isinstance(components, dict)


def denoisers_of(pipe: Any) -> dict[str, nn.Module]:
    """Return the models of a pipeline that run each step, by name; each module once."""
    found: dict[str, nn.Module] = {}
    for name, part in pipe.components.items():
        if not isinstance(part, nn.Module) or not name.startswith(DENOISERS):
            continue
        nets = getattr(part, "nets", None)  # several ControlNets in one
        parts = {f"{name}.nets.{i}": net for i, net in enumerate(nets)} if nets else {name: part}
        found |= {n: p for n, p in parts.items() if all(p is not other for other in found.values())}
    return found


class PipelineSession:
    """One attached pipeline. Made by `blockswap.attach`.

    While another component computes, the denoisers' residents leave the device if they would not
    leave it enough room; they come back with the next step.

    Attributes:
        pipe: the pipeline.
        config: what was asked for.
        sessions: one per denoiser, by component name.
    """

    def __init__(
        self,
        pipe: Any,
        config: SwapConfig,
        sessions: dict[str, Session],
        guests: list[Guest],
    ) -> None:
        self.pipe = pipe
        self.config = config
        self.sessions = sessions
        self._guests = guests
        memory = DeviceMemory(config.target_device())
        resolved = config.resolve(memory.total_bytes())
        self._cap_bytes = resolved.vram_bytes
        self._turns = Turns(sessions.values(), memory, resolved, self._record)
        self._handles: list[RemovableHandle] = []
        self._recorder: Recorder | None = None
        self._hook()
        pipe.__dict__[KEY] = self

    @property
    def state(self) -> State:
        """Return the state of the denoiser that is least far: "learning" before "ready"."""
        order: tuple[State, ...] = ("detached", "paused", "learning", "ready")
        return min((s.state for s in self.sessions.values()), key=order.index)

    def report(self) -> PipelineReport:
        """Return what happened up to the last step of each denoiser."""
        self._turns.note()
        return PipelineReport(
            {name: session.report() for name, session in self.sessions.items()},
            {guest.name: guest.report() for guest in self._guests},
        )

    def pause(self) -> None:
        """Make all weights ordinary until `resume`; components stay where they are.

        Raises:
            UseError: a forward runs.
        """
        self._unhook()
        for session in self.sessions.values():
            session.pause()

    def resume(self) -> None:
        """Stream again after `pause`.

        Raises:
            UseError: the session is detached.
        """
        if self.state == "detached":
            raise UseError("this session is detached: call blockswap.attach again")
        for session in self.sessions.values():
            session.resume()
        if not self._handles:
            self._hook()

    def detach(self) -> None:
        """Restore the pipeline: weights where they were, no hook, no trace. Safe to call twice.

        Raises:
            UseError: a forward runs.
        """
        self._unhook()
        for session in self.sessions.values():
            session.detach()
        if self.pipe.__dict__.get(KEY) is self:
            del self.pipe.__dict__[KEY]

    @contextlib.contextmanager
    def record(self) -> Iterator[MemoryHistory]:
        """Record who holds the device's memory while the pipeline is called inside the block.

        >>> with session.record() as history:  # doctest: +SKIP
        ...     image = pipe("a red fox").images[0]
        >>> history.save("memory.png")  # doctest: +SKIP
        """
        memory = DeviceMemory(self.config.target_device())
        with recording(memory, self._cap_bytes, self.sessions) as (self._recorder, history):
            try:
                yield history
            finally:
                self._recorder = None

    def refresh(self) -> None:
        """As `Session.refresh`, for every denoiser."""
        for session in self.sessions.values():
            session.refresh()

    def trim(self) -> int:
        """Give unused cached device memory back; the bytes given back."""
        return sum(session.trim() for session in self.sessions.values())

    def __enter__(self) -> PipelineSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def __repr__(self) -> str:
        return f"<blockswap.PipelineSession {type(self.pipe).__name__} {self.state}>"

    # ---------------------------------------------------------------------------------------------

    def _hook(self) -> None:
        from blockswap import shim

        def before(_module: nn.Module, _args: object) -> None:
            self._turns.end()

        looks = shim.ShimConfig(self.config.target_device())
        for session in self.sessions.values():
            model = session.model
            self._handles.append(model.register_forward_pre_hook(before, prepend=True))
            shim.register(model, looks)
        for guest in self._guests:
            guest.watch(self._turns)
            shim.register(guest.module, looks)
        self.pipe.__dict__[CALL_END] = self._end_call

    def _unhook(self) -> None:
        from blockswap import shim

        self._turns.end()
        self.pipe.__dict__.pop(CALL_END, None)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for session in self.sessions.values():
            shim.remove(session.model)
        for guest in self._guests:
            shim.remove(guest.module)  # it keeps the forward that it found, which is ours
            guest.unwatch()

    def _end_call(self) -> None:
        self._turns.end()
        type(self.pipe).maybe_free_model_hooks(self.pipe)

    def _record(self, part: str) -> None:
        if self._recorder is not None:
            self._recorder.note(part)


def attach_pipeline(pipe: Any, config: SwapConfig, attach: Any) -> PipelineSession:
    """Attach every denoiser of a pipeline; nothing stays attached when one is refused.

    Args:
        pipe: a diffusers pipeline.
        config: as for one model; denoisers share ``vram`` by their weights.
        attach: attaches one model under a config.

    Raises:
        ConfigError: nothing to stream, or as for one model.
        CapError: another component does not fit whole under ``vram``.
        UseError: it is attached with other settings.
    """
    live = pipe.__dict__.get(KEY)
    if isinstance(live, PipelineSession):
        if different := live.config.differences(config):
            raise UseError(
                f"{type(pipe).__name__} is attached with other settings"
                f" ({', '.join(different)} differ): call session.detach() first"
            )
        live.resume()
        return live
    models = denoisers_of(pipe)
    if not models:
        parts = [n for n, part in pipe.components.items() if isinstance(part, nn.Module)]
        way_out = f"pass one of its models itself: {', '.join(f'pipe.{n}' for n in parts)}"
        raise ConfigError(
            f"{type(pipe).__name__} has no transformer, unet or controlnet to stream"
            f" ({way_out if parts else 'it has no model at all'})"
        )
    device = config.target_device()
    guests = _guests_of(pipe, set(models.values()), device)
    caps = _shares(config, models, guests)
    sessions: dict[str, Session] = {}
    try:
        for name, model in models.items():
            sessions[name] = attach(model, dataclasses.replace(config, vram=caps[name]))
        return PipelineSession(pipe, config, sessions, guests)
    except BaseException:
        for session in sessions.values():
            session.detach()
        raise


def _guests_of(pipe: Any, streamed: set[nn.Module], device: torch.device) -> list[Guest]:
    guests: list[Guest] = []
    for name, part in pipe.components.items():
        if not isinstance(part, nn.Module) or part in streamed or getattr(part, "nets", None):
            continue
        if all(part is not guest.module for guest in guests):
            if hasattr(part, "_hf_hook"):
                raise ConfigError(
                    f"accelerate offloads pipe.{name}: call pipe.remove_all_hooks() first"
                )
            guests.append(Guest(name, part, device))
    return guests


def _shares(
    config: SwapConfig, models: dict[str, nn.Module], guests: list[Guest]
) -> dict[str, int | None]:
    """Return each denoiser's part of the cap, in proportion to its weights."""
    total = DeviceMemory(config.target_device()).total_bytes()
    cap = config.resolve(total).vram_bytes
    if cap is None:
        return dict.fromkeys(models)
    for guest in guests:
        if guest.num_bytes > cap:
            raise CapError(
                f"pipe.{guest.name} has {format_bytes(guest.num_bytes)} of weights and computes as"
                f" a whole, but the cap is {format_bytes(cap)}: raise vram to at least"
                f" {guest.num_bytes} bytes, or attach pipe.{next(iter(models))} alone"
            )
    sizes = {n: sum(p.nbytes for p in model.parameters()) for n, model in models.items()}
    return {name: cap * size // sum(sizes.values()) for name, size in sizes.items()}
