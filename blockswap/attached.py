"""Which models are attached: each bears a mark, paused ones are on a list, all held ones, too."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import nn

from blockswap.binding import weights_of
from blockswap.errors import BlockswapError, ConfigError, UseError

if TYPE_CHECKING:
    from blockswap.session import Session

KEY = "_blockswap_session"

# A paused model bears no trace; attaching it again finds its session here.
_paused: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Session]] = weakref.WeakKeyDictionary()

# Models that stream, and components that come whole for their turn.
_held: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def mark(model: nn.Module, session: Session) -> None:
    """Note on a model that a session streams it; it cannot be copied or pickled meanwhile."""
    model.__dict__[KEY] = session
    hold(model)


def unmark(model: nn.Module, session: Session, paused: bool) -> None:
    """Take a session's own mark off; a paused session is found again by its model."""
    if model.__dict__.get(KEY) is session:
        let_go(model)  # before the mark goes, by which it is found
        del model.__dict__[KEY]
    if paused:
        _paused[model] = weakref.ref(session)


def hold(module: nn.Module) -> None:
    """Note that we move a module's weights; its calls go through functions of ours: no copies."""
    _held.add(module)
    module.__dict__["__reduce_ex__"] = _refuse_copy


def let_go(module: nn.Module) -> None:
    """Note that we move them no more."""
    _held.discard(module)
    module.__dict__.pop("__reduce_ex__", None)


def held_with(module: nn.Module) -> nn.Module | None:
    """Return what we hold that is this module, or is a part of it, or has it as a part."""
    inside = set(module.modules())
    return next((held for held in list(_held) if not inside.isdisjoint(held.modules())), None)


def refuse_shared(models: Iterable[nn.Module], session: Session) -> None:
    """Refuse a module of a model that another session streams.

    Each session would take the other's fetch for an edit. Modules that share a parameter, and no
    more, are tied weights: each session knows of it.

    Args:
        models: which are to stream.
        session: theirs; what it has attached itself does not count.

    Raises:
        ConfigError: there is one with weights.
    """
    others = [m for m in list(_held) if m.__dict__.get(KEY, session) is not session]
    for model in models:
        names = {module: name for name, module in model.named_modules()}
        for other in others:
            for name, module in other.named_modules():
                if module in names and any(map(weights_of, module.modules())):
                    ours, theirs = type(model).__name__, type(other).__name__
                    raise ConfigError(
                        f"{f'{ours}.{names[module]}'.rstrip('.')} is"
                        f" {f'{theirs}.{name}'.rstrip('.')} of another model, which is attached,"
                        " and two sessions cannot stream one module: detach that model and attach"
                        " both in one session, blockswap.attach(a, b, ...), or give one of them a"
                        " module of its own, by copy.deepcopy() while that session is paused"
                    )


def session_of(model: nn.Module) -> Session | None:
    """Return the model's session, attached or paused.

    Raises:
        BlockswapError: another tool uses the mark's name.
    """
    from blockswap.session import Session

    found = model.__dict__.get(KEY)
    if found is None and model in _paused:
        found = _paused[model]()
    if found is not None and not isinstance(found, Session):
        raise BlockswapError(f"model.{KEY} is not a session: another tool uses the name")
    return found if found is not None and found.state != "detached" else None


def _refuse_copy(_protocol: object) -> Any:
    raise UseError(
        "a model that blockswap streams cannot be copied or pickled as it is: call session.pause()"
        " first, or save model.state_dict()"
    )
