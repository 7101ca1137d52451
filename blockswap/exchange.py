"""What is done to the components of attached pipelines: their sessions are told of it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Iterator
from typing import Any, Protocol

import torch
from torch import nn

from blockswap.attached import KEY, session_of
from blockswap.components import Components
from blockswap.session import Session


class Follower(Protocol):
    """What is told."""

    def _follow(self) -> None:
        """Treat the components as they are now.

        Raises:
            CapError: a new one does not fit under the cap.
            ConfigError: a new one cannot be attached.
            UseError: a forward runs, or one more denoiser would need a share of the cap.
        """


def listen(pipeline: type, cast: Callable[[Any, torch.dtype], None]) -> None:
    """Have a class of pipelines tell, for good.

    Args:
        pipeline: the class.
        cast: casts what is attached of a pipeline's components.
    """
    _tell_exchanges(pipeline)
    _tell_casts(pipeline, cast)


def _tell_exchanges(pipeline: type) -> None:
    """Tell of attributes that are set; one stays what it was where the session raises.

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


def _tell_casts(pipeline: type, cast: Callable[[Any, torch.dtype], None]) -> None:
    """Tell of a dtype that `from_pipe` is given: diffusers leaves what is attached as it is.

    Without one it would make float32 of everything; what is attached keeps its dtype then.
    """
    owner: Any = next((cls for cls in pipeline.__mro__ if "from_pipe" in vars(cls)), pipeline)
    found = vars(owner).get("from_pipe")
    if not isinstance(found, classmethod) or hasattr(found.__func__, "tells_blockswap"):
        return
    original: Any = found.__func__

    @functools.wraps(original)
    def from_pipe(cls: type[Any], pipeline: Any, **kwargs: Any) -> Any:
        made = original(cls, pipeline, **kwargs)
        dtype = kwargs.get("dtype") or kwargs.get("torch_dtype")
        if dtype is not None:
            cast(made, dtype)
        return made

    from_pipe.tells_blockswap = True  # type: ignore[attr-defined]
    owner.from_pipe = classmethod(from_pipe)  # type: ignore[arg-type]


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
