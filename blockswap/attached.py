"""Which session streams a model: a mark on the model while attached, a list of paused ones."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from torch import nn

from blockswap.errors import BlockswapError, UseError

if TYPE_CHECKING:
    from blockswap.session import Session

KEY = "_blockswap_session"

# A paused model bears no trace; attaching it again finds its session here.
_paused: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Session]] = weakref.WeakKeyDictionary()


def mark(model: nn.Module, session: Session) -> None:
    """Note on a model that a session streams it; it cannot be copied or pickled meanwhile."""
    model.__dict__[KEY] = session
    refuse_copies(model)


def unmark(model: nn.Module, session: Session, paused: bool) -> None:
    """Take a session's own mark off; a paused session is found again by its model."""
    if model.__dict__.get(KEY) is session:
        allow_copies(model)  # before the mark, by which it is found
        del model.__dict__[KEY]
    if paused:
        _paused[model] = weakref.ref(session)


def refuse_copies(module: nn.Module) -> None:
    """Refuse to copy or pickle a module whose calls go through functions of ours."""
    module.__dict__["__reduce_ex__"] = _refuse_copy


def allow_copies(module: nn.Module) -> None:
    """Allow it again."""
    module.__dict__.pop("__reduce_ex__", None)


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
