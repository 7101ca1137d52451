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

from blockswap.attached import KEY
from blockswap.components import Components, entrances
from blockswap.config import SwapConfig
from blockswap.device_memory import DeviceMemory
from blockswap.errors import DeviceError, UseError
from blockswap.exchange import attached, listen, replaced
from blockswap.giving_back import Attempts
from blockswap.history import MemoryHistory, Recorder, recording
from blockswap.pipeline_report import PipelineReport
from blockswap.report import State
from blockswap.session import Session
from blockswap.turns import Turns

CALL_END = "maybe_free_model_hooks"  # what every diffusers pipeline calls last


class PipelineSession:
    """One attached pipeline. Made by `blockswap.attach`.

    While another component computes, the denoisers' residents leave the device if they would not
    leave it enough room; they come back with the next step.

    Attributes:
        pipe: the pipeline.
        config: what was asked for.
        sessions: one per component that streams, by name, the denoisers first. A component that is
            given to the pipeline meanwhile is treated as the others are.
    """

    _live: ClassVar[weakref.WeakSet[PipelineSession]] = weakref.WeakSet()

    def __init__(
        self,
        pipe: Any,
        config: SwapConfig,
        sessions: dict[str, Session],
        parts: Components,
        attach: Any,
    ) -> None:
        self.pipe = pipe
        self.config = config
        self.sessions: dict[str, Session] = {}
        self._attach = attach
        self._memory = DeviceMemory(config.target_device())
        self._resolved = config.resolve(self._memory.total_bytes())
        self._handles: list[RemovableHandle] = []
        self._is_hooked = False
        self._recorder: Recorder | None = None
        self._is_detached = False
        self._place(sessions, parts)
        self._hook()
        listen(type(pipe), self._cast)
        self._live.add(self)
        pipe.__dict__[KEY] = self

    @property
    def state(self) -> State:
        """Return the state of the denoiser that is least far: "learning" before "ready".

        It is "detached" where anything that streams is: memory was short when it was taken in anew.
        """
        if self._is_detached or any(s.state == "detached" for s in self.sessions.values()):
            return "detached"
        order: tuple[State, ...] = ("detached", "paused", "learning", "ready")
        states: list[State] = ["ready" if self._is_hooked else "paused"]
        return min(states + [session.state for session in self._denoisers], key=order.index)

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
            CapError: what was given to the pipeline meanwhile does not fit under the cap.
        """
        if self.state == "detached":
            raise UseError("this session is detached: call blockswap.attach again")
        if is_paused := not self._is_hooked:
            self._unhook()  # anew, should that have been broken off
            self._exchange()
        for session in self.sessions.values():
            session.resume()
        if is_paused:
            self._hook()

    def detach(self) -> None:
        """Restore the pipeline: weights where they were, no hook, no trace. Safe to call twice.

        What another attached pipeline shares with it goes on streaming for that one.

        Raises:
            UseError: a forward runs.
            DeviceError: the device failed; all is detached, as by `Session.detach`.
        """
        self._refuse_running()
        sharing = self._sharing()
        ours = [
            s for s in self.sessions.values() if all(s not in o.sessions.values() for o in sharing)
        ]
        attempt = Attempts()
        attempt(self._unhook)
        for session in ours:
            attempt(session.detach)
        self._live.discard(self)
        self._hook_again(sharing)
        self._is_detached = True
        if self.pipe.__dict__.get(KEY) is self:
            del self.pipe.__dict__[KEY]
        if attempt.failures:  # that of a session tells most
            told = [f for f in attempt.failures if isinstance(f, DeviceError)]
            raise (told or attempt.failures)[0]

    @contextlib.contextmanager
    def record(self) -> Iterator[MemoryHistory]:
        """Record who holds the device's memory while the pipeline is called inside the block.

        >>> with session.record() as history:  # doctest: +SKIP
        ...     image = pipe("a red fox").images[0]
        >>> history.save("memory.png")  # doctest: +SKIP
        """
        memory, cap = DeviceMemory(self._memory.device), self._resolved.vram_bytes
        with recording(memory, cap, self.sessions) as (self._recorder, history):
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

    def _place(self, sessions: dict[str, Session], parts: Components) -> None:
        self._parts = parts
        self._guests = parts.guests
        self._denoisers = [sessions[name] for name in parts.denoisers]
        visitors = [sessions[name] for name in parts.visitors]
        self._turns = Turns(
            self._denoisers,
            visitors,
            self._memory,
            self._resolved,
            self._record,
            lambda: [other._turns for other in self._sharing()],
        )
        self.sessions.clear()
        self.sessions.update((name, sessions[name]) for name in parts.denoisers | parts.visitors)

    def _follow(self) -> None:
        """Treat the components as they are now, see `Follower`; while paused, `resume` does it."""
        if not self._is_hooked:
            return
        self._refuse_running()
        sharing = self._sharing()
        self._unhook()
        try:
            self._exchange()
        finally:
            self._hook()
            self._hook_again(sharing)

    def _exchange(self) -> None:
        """Attach what is new and let go of what is not there any more, or change nothing."""
        for session in self.sessions.values():
            session.vacate()  # what is new finds the room that the others found
        parts = Components.of(self.pipe, self.config, self._parts)
        theirs = {s for other in self._sharing() for s in other.sessions.values()}
        gone = [s for s in self.sessions.values() if s.model not in parts.modules]
        with replaced(set(gone) - theirs), attached(parts, self._attach) as sessions:
            self._place(sessions, parts)
        self._memory.give_back()  # what was on the device, and is on the host now

    def _sharing(self) -> list[PipelineSession]:
        """Return the other sessions that have a component of ours."""
        ours = self._parts.modules
        others = [other for other in self._live if other is not self]
        return [other for other in others if any(m in ours for m in other._parts.modules)]

    @staticmethod
    def _hook_again(sharing: list[PipelineSession]) -> None:
        """Put back what we took off the components that they share with us."""
        for other in sharing:
            if other._is_hooked:
                other._unhook()
                other._hook()

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
        self._is_hooked = True

    def _put_hooks(self) -> None:
        from blockswap import shim

        looks = shim.ShimConfig(self.config.target_device())
        for name, session in self.sessions.items():
            before = partial(self._begin, name, session)
            for module in entrances(session.model, is_denoiser=session in self._denoisers):
                self._handles.append(module.register_forward_pre_hook(before, prepend=True))
            shim.register(session.model, looks)
        for guest in self._guests:
            guest.watch(self._turns)
            shim.register(guest.module, looks)
        for donor in self._parts.donors:
            shim.register(donor, looks)
        self.pipe.__dict__ |= {CALL_END: self._end_call, "to": self._to}

    def _unhook(self) -> None:
        from blockswap import shim

        self._is_hooked = False
        try:
            self._turns.end()
        finally:
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
            for donor in self._parts.donors:
                shim.remove(donor)

    def _begin(self, name: str, session: Session, _module: nn.Module, _args: object) -> None:
        if session.state == "detached":
            raise UseError(
                f"pipe.{name} is detached, and the pipeline's session needs it: call"
                " blockswap.attach(pipe, ...) again, or detach() on that session"
            )
        self._turns.stream(session)

    def _end_call(self) -> None:
        for session in (self, *self._sharing()):  # their hooks brought what we have in common, too
            session._turns.end()
        type(self.pipe).maybe_free_model_hooks(self.pipe)

    def _to(self, *args: Any, **kwargs: Any) -> Any:
        """Cast what is attached, too: diffusers leaves it as it is, and tells nobody."""
        type(self.pipe).to(self.pipe, *args, **kwargs)
        self._turns.end()
        for dtype in (*args, kwargs.get("dtype"), kwargs.get("torch_dtype")):
            if isinstance(dtype, torch.dtype):
                self._cast(self.pipe, dtype)
        return self.pipe

    @classmethod
    def _cast(cls, pipe: Any, dtype: torch.dtype) -> None:
        parts = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
        theirs = {module for part in parts for module in part.modules()}
        for session in cls._live:
            if shared := theirs.intersection(session._parts.modules):
                session._turns.end()
            for module in shared:
                module.to(dtype=dtype)
            for guest in session._guests:
                if guest.module in shared and session._is_hooked:  # not while paused
                    guest.pin()

    def _record(self, part: str) -> None:
        if self._recorder is not None:
            self._recorder.note(part)
