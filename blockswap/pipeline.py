"""Pipelines: what is large streams, every other component takes turns on the device."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from blockswap.attached import session_of
from blockswap.binding import weights_of
from blockswap.components import Components
from blockswap.config import SwapConfig
from blockswap.device_memory import DeviceMemory
from blockswap.errors import UseError
from blockswap.guests import Guest
from blockswap.history import MemoryHistory, Recorder, recording
from blockswap.pipeline_report import PipelineReport
from blockswap.report import State
from blockswap.session import Session
from blockswap.turns import Turns

KEY = "_blockswap_session"
CALL_END = "maybe_free_model_hooks"  # what every diffusers pipeline calls last


class PipelineSession:
    """One attached pipeline. Made by `blockswap.attach`.

    While another component computes, the denoisers' residents leave the device if they would not
    leave it enough room; they come back with the next step.

    Attributes:
        pipe: the pipeline.
        config: what was asked for.
        sessions: one per component that streams, by name, the denoisers first.
    """

    _live: ClassVar[weakref.WeakSet[PipelineSession]] = weakref.WeakSet()

    def __init__(
        self, pipe: Any, config: SwapConfig, sessions: dict[str, Session], parts: Components
    ) -> None:
        self.pipe = pipe
        self.config = config
        self.sessions = sessions
        self._guests = parts.guests
        self._denoisers = [sessions[name] for name in parts.denoisers]
        memory = DeviceMemory(config.target_device())
        resolved = config.resolve(memory.total_bytes())
        self._cap_bytes = resolved.vram_bytes
        visitors = [sessions[name] for name in parts.visitors]
        self._turns = Turns(self._denoisers, visitors, memory, resolved, self._record)
        self._handles: list[RemovableHandle] = []
        self._recorder: Recorder | None = None
        self._is_detached = False
        self._hook()
        self._live.add(self)
        pipe.__dict__[KEY] = self

    @property
    def state(self) -> State:
        """Return the state of the denoiser that is least far: "learning" before "ready"."""
        if self._is_detached:
            return "detached"
        order: tuple[State, ...] = ("detached", "paused", "learning", "ready")
        return min((session.state for session in self._denoisers), key=order.index)

    def report(self) -> PipelineReport:
        """Return what happened up to the last step of each component."""
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
        self._refuse_running()
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

        What another attached pipeline shares with it goes on streaming for that one.

        Raises:
            UseError: a forward runs.
        """
        self._refuse_running()
        self._unhook()
        self._live.discard(self)
        sharing = [other for other in self._live if other._shares_with(self)]
        for session in self.sessions.values():
            if all(session not in other.sessions.values() for other in sharing):
                session.detach()
        for other in sharing:  # we took off what both had put on the shared components
            if other._handles:
                other._unhook()
                other._hook()
        self._is_detached = True
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
        """As `Session.refresh`, for all that streams."""
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

    def _shares_with(self, other: PipelineSession) -> bool:
        theirs = list(other.sessions.values())
        return any(session in theirs for session in self.sessions.values())

    def _refuse_running(self) -> None:
        for session in self.sessions.values():
            session._refuse_running()

    def _hook(self) -> None:
        try:
            self._put_hooks()
        except BaseException:
            self._unhook()
            raise
        self._turns.start()

    def _put_hooks(self) -> None:
        from blockswap import shim

        looks = shim.ShimConfig(self.config.target_device())
        for session in self.sessions.values():
            before = partial(self._begin, session)
            for module in self._entrances(session):
                self._handles.append(module.register_forward_pre_hook(before, prepend=True))
            shim.register(session.model, looks)
        for guest in self._guests:
            guest.watch(self._turns)
            self._pin(guest)
            shim.register(guest.module, looks)
        self.pipe.__dict__ |= {CALL_END: self._end_call, "to": self._to}

    def _unhook(self) -> None:
        from blockswap import shim

        self._turns.end()
        for name in (CALL_END, "to"):
            self.pipe.__dict__.pop(name, None)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for session in self.sessions.values():
            shim.remove(session.model)
        for guest in self._guests:
            shim.remove(guest.module)  # it keeps the forward that it found, which is ours
            guest.unwatch()

    def _entrances(self, session: Session) -> Iterator[nn.Module]:
        """Yield where a component may be entered: parts of text encoders are called alone, too."""
        yield session.model
        if session not in self._denoisers:
            for module in session.model.modules():
                if module is not session.model and weights_of(module):
                    yield module

    def _begin(self, session: Session, _module: nn.Module, _args: object) -> None:
        self._turns.stream(session)

    def _end_call(self) -> None:
        self._turns.end()
        type(self.pipe).maybe_free_model_hooks(self.pipe)

    def _to(self, *args: Any, **kwargs: Any) -> Any:
        """Cast what is attached, too: diffusers leaves it as it is, and tells nobody."""
        type(self.pipe).to(self.pipe, *args, **kwargs)
        self._turns.end()
        for dtype in (*args, kwargs.get("dtype"), kwargs.get("torch_dtype")):
            if isinstance(dtype, torch.dtype):
                for session in self.sessions.values():
                    session.model.to(dtype=dtype)
                for guest in self._guests:
                    guest.module.to(dtype=dtype)
                    self._pin(guest)
        return self.pipe

    def _pin(self, guest: Guest) -> None:
        """Have a guest come from pinned memory, unless the user bounds what is pinned."""
        if self.config.host_memory is None and self.config.target_device().type != "cpu":
            guest.pin()

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
        CapError: another component does not fit under ``vram``.
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
    parts = Components.of(pipe, config)
    sessions: dict[str, Session] = {}
    models = parts.visitors | parts.denoisers
    others = {name for name, model in models.items() if session_of(model) is not None}
    try:
        for name, model in models.items():
            leaving = [models[n] for n in models if n not in sessions]
            sessions[name] = attach(model, parts.configs[name], leaving)
            if name in parts.visitors:  # it has the device for itself, and leaves it to others
                sessions[name]._state.is_visitor = True
                sessions[name].vacate()
        ordered = {name: sessions[name] for name in parts.denoisers | parts.visitors}
        return PipelineSession(pipe, config, ordered, parts)
    except BaseException:
        for name, session in sessions.items():
            if name not in others:
                session.detach()
        raise
