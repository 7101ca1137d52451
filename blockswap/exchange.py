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

CONFIG = "_internal_dict"  # of a diffusers pipeline; never changed, always exchanged


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
    """Tell of components that are set, deleted or registered; see `_told`."""

    def set_attribute(original: Any, pipe: Any, name: str, value: object) -> None:
        if _is_component(value, vars(pipe).get(name)):
            _told(pipe, [name], lambda: original(pipe, name, value))
        else:  # a call of the pipeline sets many
            original(pipe, name, value)

    def delete_attribute(original: Any, pipe: Any, name: str) -> None:
        _told(pipe, [name], lambda: original(pipe, name))

    def register_modules(original: Any, pipe: Any, **modules: Any) -> None:
        _told(pipe, modules, lambda: original(pipe, **modules))

    _wrap(pipeline, "__setattr__", set_attribute)
    _wrap(pipeline, "__delattr__", delete_attribute)
    if hasattr(pipeline, "register_modules"):  # every loader of diffusers ends there
        _wrap(pipeline, "register_modules", register_modules)


def _wrap(pipeline: type, name: str, around: Callable[..., None]) -> None:
    """Exchange a method where it is defined, once; ``around`` gets the original one first."""
    owner = next(cls for cls in pipeline.__mro__ if name in vars(cls))
    owner = pipeline if owner is object else owner
    original: Any = getattr(owner, name)
    if hasattr(original, "tells_blockswap"):
        return

    @functools.wraps(original)
    def method(pipe: Any, *args: Any, **kwargs: Any) -> None:
        around(original, pipe, *args, **kwargs)

    method.tells_blockswap = True  # type: ignore[attr-defined]
    setattr(owner, name, method)


def _told(pipe: Any, names: Collection[str], change: Callable[[], None]) -> None:
    """Change components, and tell their session once; where it refuses, all is what it was.

    Args:
        pipe: the pipeline.
        names: of the attributes that change, and with them the config: that is what is saved.
        change: does it.
    """
    attributes = vars(pipe)
    if KEY not in attributes:
        change()
        return
    before = {name: attributes[name] for name in (*names, CONFIG) if name in attributes}
    session: Follower = attributes.pop(KEY)  # what is set meanwhile is told of with the rest
    try:
        try:
            change()
        finally:
            attributes[KEY] = session
        pairs = [(before.get(name), attributes.get(name)) for name in names]
        if any(old is not new and _is_component(old, new) for old, new in pairs):
            session._follow()
    except BaseException:
        for name in (*names, CONFIG):
            attributes.pop(name, None)
        attributes.update(before)
        raise


def _is_component(*values: object) -> bool:
    return any(isinstance(value, nn.Module) for value in values)


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
