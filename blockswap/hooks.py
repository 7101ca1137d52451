"""Hooks around the model, its blocks and its leaf modules: where the engine hears of a forward."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from threading import get_ident
from typing import Any, Protocol

import torch
from torch import nn

from blockswap.attempt import OURS, Attempt, is_foreign
from blockswap.binding import Gate, Unit, weights_of
from blockswap.model_state import ModelState
from blockswap.retry import Retry

logger = logging.getLogger("blockswap")


class Entrance(Protocol):
    """What the hooks need of a session."""

    gate: Gate
    retry: Retry
    _state: ModelState

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Open the gate: ``module`` is the outermost one of ours that runs."""

    def leave(self, module: nn.Module, completed: bool = True) -> None:
        """Close the gate if ``module`` opened it."""

    def relieve(self, error: torch.OutOfMemoryError, attempt: Attempt) -> bool:
        """Hear that PyTorch had no memory in a forward that has ended; True: run it again."""

    def abort(self) -> None:
        """Close the gate after an interruption."""

    def log_run(self, unit: Unit) -> None:
        """Hear, while learning, that a streamed piece begins to run, and with which unit."""


class Hooks:
    """All hooks of one session; removed together.

    The model and its blocks get a forward of their own in front of theirs: a hook of PyTorch costs
    the host several times as much, and hears nothing of Ctrl-C. The leaves get PyTorch's hooks.
    """

    def __init__(self, session: Entrance, models: list[nn.Module], blocks: list[nn.Module]) -> None:
        self._models = models
        self._session = session
        self._blocks = blocks
        self._entrance: list[Entrance] = []  # where all doors lead, and nowhere when it is empty
        self._doors: list[_Door] = []
        self._hooked: set[nn.Module] = set()  # leaves
        self._before, self._after = _leaf_hooks(session)

    def open(self) -> None:
        """Put a forward of our own in front of the model's and the blocks'."""
        for module in (*self._models, *self._blocks):
            self._doors.append(_door_of(module))
            self._doors[-1].open(self._entrance)
        self._entrance.append(self._session)

    @property
    def are_open(self) -> bool:
        """Whether they lead to the session; not once they are being removed."""
        return bool(self._entrance)

    def place(self, learns: bool) -> None:
        """Put hooks on the leaves: on all while learning, else on the ends of streamed pieces.

        A leaf that runs again after its piece was released calls for the piece once more.

        A compiled block needs them on all of its leaves, always: see `_leaf_hooks`.
        """
        self._session.gate.learns = learns
        everywhere = learns or self.is_compiled
        self._unhook()
        for module, unit in self._session._state.unit_of.items():
            self._hooked.add(module)  # first: it may be broken off
            if everywhere or unit.is_first or unit.is_repeated:
                module.register_forward_pre_hook(self._before)
            if everywhere or unit.is_last:
                module.register_forward_hook(self._after, always_call=True)

    @property
    def is_compiled(self) -> bool:
        """Whether the model or its first block was given to ``compile()``."""
        modules = [*self._models, *self._blocks[:1]]
        return any(module._compiled_call_impl is not None for module in modules)

    @property
    def are_foreign(self) -> bool:
        """Whether another tool's forward is called through one of them."""
        return any(door.is_foreign for door in self._doors)

    def remove(self) -> None:
        """Take every hook off. Safe to call twice."""
        self._entrance.clear()  # all doors at once, should the rest be broken off
        self._unhook()
        for door in self._doors:
            door.remove()

    def _unhook(self) -> None:
        """Take the leaves' hooks off; found by what they are, for a handle may have been lost."""
        for module in self._hooked:
            hooks = (module._forward_pre_hooks, self._before), (module._forward_hooks, self._after)
            for held, own in hooks:
                for number in [n for n, hook in held.items() if hook is own]:
                    module._forward_hooks_always_called.pop(number, None)
                    del held[number]  # last: by it the hook is found
        self._hooked.clear()


def _door_of(module: nn.Module) -> _Door:
    """Return a new door, or the one that was left inside other tools' forwards.

    A second one, in front of those, would go with them: they put back what they had found.
    """
    left = getattr(module.__dict__.get("forward"), OURS, None)
    if isinstance(left, _Door) and left.module is module and not left.sessions:
        return left
    return _Door(module)


class _Door:
    """A module's forward, entered through a session unless its model runs already.

    Attributes:
        module: whose it is.
        forward: what is put on the module.
        sessions: the one that it leads to, for all doors of one session; none once it is removed.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._had = had = module.__dict__.get("forward")  # put there by another tool
        self.sessions: list[Entrance] = []

        @functools.wraps(module.forward)
        def forward(*args: Any, **kwargs: Any) -> Any:
            # Looked up at each call: tools exchange the class of a module, or its class's forward.
            original = had or functools.partial(type(module).forward, module)
            sessions = self.sessions
            if torch.compiler.is_compiling() or not sessions:
                return original(*args, **kwargs)
            session = sessions[0]
            gate = session.gate
            inside = gate.is_open and gate.is_whole and gate.root is not module
            if inside and gate.owner == get_ident():
                return original(*args, **kwargs)
            attempt = Attempt((args, kwargs), session._state.token.device)
            while True:
                session.enter(module, args, kwargs)
                try:
                    with session.retry.watched(attempt):
                        output = original(*args, **kwargs)
                except Exception as error:
                    try:
                        session.leave(module, completed=False)
                        if isinstance(error, torch.OutOfMemoryError) and session.relieve(
                            error, attempt
                        ):
                            continue  # which frees what the failed forward held
                    except Exception:
                        logger.exception("%s failed, and closing it, too", type(module).__name__)
                    raise
                except BaseException:
                    session.abort()
                    raise
                session.leave(module)
                return output

        setattr(forward, OURS, self)
        self.forward = forward

    def open(self, sessions: list[Entrance]) -> None:
        """Lead to this session. One that was left inside other tools' forwards stays there."""
        self.sessions = sessions
        if self.module.__dict__.get("forward") is self._had:
            self.module.forward = self.forward

    @property
    def is_foreign(self) -> bool:
        """Whether it stands in front of another tool's forward."""
        return is_foreign(self.module, self._had)

    def remove(self) -> None:
        """Give the module its own forward back; inert where others have wrapped ours since."""
        self.sessions = []
        if self.module.__dict__.get("forward") is self.forward:
            if self._had is None:
                del self.module.forward
            else:
                self.module.forward = self._had


def _leaf_hooks(session: Entrance) -> tuple[Callable[..., None], Callable[..., None]]:
    """Return the two functions that all leaves of all blocks share.

    They must not differ between sibling blocks, nor hold a constant of one leaf: a compiler reuses
    one block's graph for its siblings. A compiled block calls the ops on every leaf; in eager mode
    a leaf that neither begins nor ends a streamed piece returns at once.
    """
    gate, state = session.gate, session._state
    token, units = state.token, state.unit_of
    acquire, release = torch.ops.blockswap.acquire_.default, torch.ops.blockswap.release_.default
    # The same ops with the leaf's weights; called from C++, they cost the host a fraction.
    acquire_leaf, release_leaf = state.binding.acquire_leaf, state.binding.release_leaf

    def before(module: nn.Module, _args: Any) -> None:
        if torch.compiler.is_compiling():
            acquire(token, weights_of(module))
            return
        unit = units[module]
        if gate.owner != get_ident():  # closed, or open for another thread
            session.enter(module, (), {})
        gate.running = unit
        piece = unit.piece
        if piece >= 0 and piece != gate.live and not unit.is_diverted:
            acquire_leaf(unit.index)
            gate.live, gate.runs_left = piece, unit.runs_of_last
            if gate.learns:
                session.log_run(unit)

    def after(module: nn.Module, _args: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            release(token, tensors_in(output), weights_of(module))
            return
        if gate.owner != get_ident():
            return  # refused before it ran
        unit = units[module]
        gate.running = None
        if unit.is_last and unit.piece == gate.live:
            gate.runs_left -= 1
            if gate.runs_left <= 0:
                release_leaf(unit.index, tensors_in(output))
                gate.live = -1
        if gate.root is module:
            session.leave(module)

    return before, after


def tensors_in(value: Any) -> list[torch.Tensor]:
    """Return the tensors of a leaf's output, one level deep."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [item for item in value if isinstance(item, torch.Tensor)]
    if isinstance(value, dict):
        return [item for item in value.values() if isinstance(item, torch.Tensor)]
    return []
