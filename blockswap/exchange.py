"""Components that are exchanged while their pipeline is attached: its session is told of each."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Collection, Iterator
from typing import Any, Protocol

from torch import nn

from blockswap.attached import KEY, session_of
from blockswap.components import Components
from blockswap.session import Session


class Follower(Protocol):
    """What is told."""

    def _follow(self) -> None:
        """Treat the components as they are now, or raise and change nothing."""


def listen(pipeline: type) -> None:
    """Have a class of pipelines tell; the attribute stays what it was where the session raises.

    `register_modules`, and with it every loader of diffusers, sets attributes, too.
    """
    owner = next(cls for cls in pipeline.__mro__ if "__setattr__" in vars(cls))
    owner = pipeline if owner is object else owner
    original: Any = owner.__setattr__
    if hasattr(original, "tells_blockswap"):
        return

    @functools.wraps(original)
    def set_attribute(pipe: Any, name: str, value: object) -> None:
        session: Follower | None = vars(pipe).get(KEY)
        before = vars(pipe).get(name)
        original(pipe, name, value)
        is_exchange = value is not before and any(isinstance(v, nn.Module) for v in (value, before))
        if session is None or not is_exchange:
            return
        try:
            session._follow()
        except BaseException:
            original(pipe, name, before)
            raise

    set_attribute.tells_blockswap = True  # type: ignore[attr-defined]
    owner.__setattr__ = set_attribute  # type: ignore[method-assign, assignment]


@contextlib.contextmanager
def attached(parts: Components, attach: Any) -> Iterator[dict[str, Session]]:
    """Attach what streams; nothing that was not attached stays so when one is refused.

    Args:
        parts: the components.
        attach: attaches one model under a config; returns the session of one that is attached.
    """
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
        yield sessions
    except BaseException:
        for name, session in sessions.items():
            if name not in others:
                session.detach()
        raise


@contextlib.contextmanager
def replaced(sessions: Collection[Session]) -> Iterator[None]:
    """Detach what others replace; it goes on where they are refused."""
    running = [session for session in sessions if session.state != "paused"]
    for session in sessions:
        session.pause()
    try:
        yield
    except BaseException:
        for session in running:
            session.resume()
        raise
    for session in sessions:
        session.detach()
