"""A session: one model, streamed. Opens and closes forwards; everything else it hands on."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from threading import get_ident
from typing import Any

import torch
from torch import nn

from blockswap import attached, preflight
from blockswap.attempt import Attempt
from blockswap.autocast import AutocastCache
from blockswap.binding import ONE_CALLER, Gate, Unit
from blockswap.blocks import Block
from blockswap.callers import num_running
from blockswap.claim import Claim
from blockswap.config import SwapConfig
from blockswap.errors import DeviceError, UseError
from blockswap.feasible import renew_blocks
from blockswap.hooks import Hooks
from blockswap.learning import shape_key
from blockswap.model_state import ModelState
from blockswap.report import Report, State, Timeline
from blockswap.retry import Retry
from blockswap.steward import Steward
from blockswap.together import Cycle, members_of, name_of


class Session:
    """One attached model. Made by `blockswap.attach`.

    A forward of the model, or of one of its blocks alone, opens the session's gate: parameters are
    bound to the device and pieces stream; at its end they read as their host images again. One
    forward at a time; a second thread is refused.

    Attributes:
        model: the model.
        config: what was asked for.
    """

    def __init__(self, model: nn.Module, config: SwapConfig, blocks: list[Block]) -> None:
        self.model = model
        self.config = config
        self.gate = Gate()
        self._members = list(members_of(model).values())
        self._part_of = {member: part for part, member in enumerate(self._members)}.get
        self._cycle = Cycle(len(self._members))
        self._claim = Claim()
        self._autocast_cache = AutocastCache()
        self._hooks: Hooks | None = None
        self._state = ModelState(model, config, blocks, self.gate)
        self._steward = Steward(self._state, self._place_hooks)
        self.retry = Retry(self._steward)
        self.gate.read_outside = weakref.WeakMethod(self.fetch_whole)
        self._start()

    # What users call -----------------------------------------------------------------------------
    @property
    def state(self) -> State:
        """Return "learning", "ready", "paused" or "detached"."""
        if self._hooks is None or not self._hooks.are_open:
            return "detached" if self._state.is_detached else "paused"
        return "ready" if self._steward.is_ready else "learning"

    def report(self) -> Report:
        """Return what happened up to the last step; waits for that step."""
        return self._steward.report(self.state)

    def timeline(self) -> Timeline | None:
        """Return when each piece of the last step ran, after it; None if nothing streams yet."""
        return self._steward.timeline()

    def pause(self) -> None:
        """Give ordinary weights back until `resume`; the device's memory is free meanwhile.

        Raises:
            UseError: a forward runs.
        """
        self._between_forwards(lambda: self._let_go(detach=False))

    def resume(self) -> None:
        """Stream again after `pause`.

        Raises:
            UseError: the session is detached.
            ConfigError, CapError: the model was edited; it stays paused.
        """
        if self._hooks is None or not self._hooks.are_open:
            if self._state.is_detached:
                raise UseError("this session is detached: call blockswap.attach again")
            self.pause()  # anew, should that have been broken off
            renew_blocks(self._state, self.config)
            self._start()

    def detach(self) -> None:
        """Restore the model: its weights where they were, no hook, no trace. Safe to call twice.

        Where the device fails for good, the model is detached all the same: streamed weights are
        in host memory, and the error names what only the device held.

        Raises:
            UseError: a forward runs.
            DeviceError: the device failed.
        """
        self._between_forwards(lambda: self._let_go(detach=True))

    def refresh(self) -> None:
        """Make the next forward use weights that were changed through references taken earlier.

        Changes through the model itself are noticed; what bypasses it (a tensor got from
        ``state_dict()`` or ``p.data`` before the last forward) is not.
        """
        self.gate.touched.update(self._state.units.values())

    def trim(self) -> int:
        """Give PyTorch's unused cached device memory back; the bytes given back."""
        return self._state.memory.give_back()

    def vacate(self, at_least_bytes: int | None = None) -> None:
        """Give device memory of residents and ring back until the next forward: so much, or all.

        Raises:
            UseError: a forward runs.
        """
        if self._hooks is not None:
            self._between_forwards(lambda: self._steward.vacate(at_least_bytes))
            self._cycle.interrupt()

    # What the hooks call -------------------------------------------------------------------------
    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Open the gate; inside an open one, do nothing.

        Raises:
            UseError: another thread is inside, or autograd would need the weights later.
        """
        if self._claim.is_mine:
            if self.gate.is_open:
                alone = self.gate.root in self._state.unit_of
                if self.gate.root is not module and not (alone and self.gate.is_stale()):
                    return
            self._recover()
        if not self._claim.take():
            raise UseError(f"two forwards of {name_of(self.model)} at once: {ONE_CALLER}")
        try:
            if torch.is_grad_enabled():
                needed = self._state.requires_grad()
                preflight.refuse_grad(self.model, needed, (*args, *kwargs.values()))
            with torch.inference_mode(mode=False), torch.no_grad():
                if self._state.is_restructured() or not self._state.reconcile():
                    self._rebuild()
                continues = self._go_on(module, args, kwargs)
            self.retry.note()
            self.gate.owner = get_ident()
            self.gate.root, self.gate.live, self.gate.running = module, -1, None
            self.gate.is_whole = self._part_of(module) is not None
            self._state.begin_step(continues)
            self._autocast_cache.turn_off(self._state.token.device.type)
            self.gate.is_open = True
        except BaseException:
            self._close()
            raise

    def leave(self, module: nn.Module, completed: bool = True) -> None:
        """Close the gate if ``module`` opened it.

        Args:
            module: what has run.
            completed: False when it raised; such a step teaches nothing.

        Raises:
            UseError: the forward changed a weight.
        """
        if self.gate.root is not module or self.gate.owner != get_ident():
            return
        try:
            edited = self._close()
        except BaseException:
            self.abort()
            raise
        part = self._part_of(module)
        done = completed if part is None else self._cycle.leave(part, completed)
        if done is not None:
            self._steward.after_step(done)
        if edited:
            raise preflight.edited_in_forward(edited)

    def relieve(self, error: torch.OutOfMemoryError, attempt: Attempt) -> bool:
        """Give memory back after PyTorch had none in a forward; whether to run it again."""
        if self.gate.is_open or self._hooks is None:
            return False
        return self.retry.give(error, attempt)

    def abort(self) -> None:
        """Close the gate after an interruption; the next forward starts clean."""
        if self._claim.is_mine:
            self._close()
        self._cycle.interrupt()

    def fetch_whole(self, unit: Unit) -> None:
        """Copy a unit's weights to the device for the rest of this forward."""
        self._state.divert(unit)

    def log_run(self, unit: Unit) -> None:
        """Note the order in which pieces begin to run."""
        self._steward.runs.append(unit.index)

    def _go_on(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Begin a step, or go on with the open one; whether it goes on."""
        part = self._part_of(module)
        if part is None:
            self._cycle.interrupt()
            self._steward.before_step(None)
            return False
        key = self._cycle.enter(part, shape_key(args, kwargs))
        if key is not None:
            self._steward.before_step(key)
        return key is None

    def _start(self) -> None:
        attached.refuse_shared(self._members, self)
        try:
            self._state.take()
            self._steward.start()
            # Hooks hold the session weakly, the model holds it: so both can be collected.
            modules = [block.module for block in self._state.blocks]
            self._hooks = Hooks(weakref.proxy(self), self._members, modules)
            self._hooks.open()
            for member in self._members:
                attached.mark(member, self)
            self._place_hooks()
        except BaseException:
            self._let_go(detach=True)
            raise

    def _place_hooks(self) -> None:
        self.retry.renew(self._hooks)
        if self._hooks is not None:
            self._hooks.place(learns=self._steward.traces)

    def _between_forwards(self, act: Callable[[], None]) -> None:
        if self._claim.is_mine and (self.gate.is_stale() or not self.gate.is_open):
            self._recover()
        if self._claim.is_mine or not self._claim.take():
            raise UseError("a forward runs: do this between forwards")
        try:
            act()
        finally:
            self._claim.give_up()

    def _recover(self) -> None:
        """Close what Ctrl-C has left open: this thread still has the session, but is through."""
        if num_running(self, ("enter", "leave", "abort", "_between_forwards")) > 1:
            raise UseError(f"{name_of(self.model)} begins or ends a forward: {ONE_CALLER}")
        self.abort()

    def _refuse_running(self) -> None:
        self._between_forwards(lambda: None)

    def _let_go(self, detach: bool) -> None:
        failure = self._give_back(detach, settles=self._hooks is not None)
        self.retry.renew(None)
        self._cycle.interrupt()
        for member in self._members:
            attached.unmark(member, self, paused=not detach)
        if failure is not None:
            raise failure

    def _give_back(self, detach: bool, settles: bool = False) -> DeviceError | None:
        if self._hooks is not None:
            self._hooks.remove()
            self._hooks = None
        self._steward.stop()
        return self._state.give_back(detach, settles)

    def _close(self) -> list[str]:
        """Close the gate, however much of it is open; the weights that the forward changed.

        Broken off itself, it leaves this thread the session, so that it is called again.
        """
        self.gate.is_open, self.gate.running, self.gate.root = False, None, None
        try:
            edited = self._state.end_step() if self._state.is_taken else []
        except Exception:
            self._give_up()
            raise
        self._give_up()
        return edited

    def _give_up(self) -> None:
        self._autocast_cache.restore()
        self.gate.owner = 0
        self._claim.give_up()

    def _rebuild(self) -> None:
        """Take the model in anew: modules or parameters came, went or changed shape (LoRA)."""
        preflight.refuse_whole_casts(self.model)
        self._cycle.interrupt()
        try:
            self._give_back(detach=False)
            renew_blocks(self._state, self.config)
            self._start()
        except BaseException as error:
            self._let_go(detach=True)
            preflight.note_detached(error)
            raise

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def __deepcopy__(self, memo: object) -> Any:
        raise UseError("a session cannot be copied: call session.pause() before copying the model")

    def __repr__(self) -> str:
        return f"<blockswap.Session {name_of(self.model)} {self.state}>"
