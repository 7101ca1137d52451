"""Components of a pipeline that do not stream: each is on the device whole, for its turn."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from blockswap import _C
from blockswap.attached import hold, let_go
from blockswap.attempt import OURS, Attempt, Stillness
from blockswap.binding import TurnGate, Unit, WatchedParameters, unwatch, weights_of
from blockswap.home import Home
from blockswap.sizes import format_bytes

CALLS = ("forward", "encode", "decode")  # by which a component is used from outside


@dataclass(frozen=True)
class GuestReport:
    """One component that computes whole.

    Attributes:
        weight_bytes: what it takes on the device, activations not counted.
        pinned_bytes: of host memory, for what comes from there at the speed of the link.
        turns: how often it came to the device.
        peak_bytes: the most that the device held in a turn, denoisers and what PyTorch cached
            included; None on a CPU.
    """

    weight_bytes: int
    pinned_bytes: int
    turns: int
    peak_bytes: int | None

    def __str__(self) -> str:
        times = "1 turn" if self.turns == 1 else f"{self.turns} turns"
        text = f"{format_bytes(self.weight_bytes)} of weights, whole on the device for {times}"
        return text if self.peak_bytes is None else f"{text}, peak {format_bytes(self.peak_bytes)}"


class Stage(Protocol):
    """What a guest needs to know of the device."""

    def begin(self, guest: Guest) -> None:
        """Make room, and let it come."""

    def computing(
        self, guest: Guest, can_repeat: Callable[[], bool]
    ) -> AbstractContextManager[None]:
        """Bound what it computes with; raise where memory is out, if there would be more again."""

    def leave_room_for_copies(self, result: object) -> None:
        """Hear what a call has returned: the pipeline makes more of it."""

    def relieve(self, error: torch.OutOfMemoryError, can_repeat: bool) -> bool:
        """Hear that memory was out; True: there is more now, call again."""


@dataclass(frozen=True)
class _Away:
    """One tensor that is on the device for a turn.

    Attributes:
        tensor: it.
        home: its values in host memory.
        layout: of what came to the device.
        version: of it; None: not counted.
    """

    tensor: torch.Tensor
    home: torch.Tensor
    layout: tuple[object, ...]
    version: int | None


class Guest:
    """One component: a text encoder, a VAE.

    Its tensors stay the same objects. During a turn they lie on the device, afterwards again where
    they were; what was written meanwhile is kept.

    Args:
        name: of the component.
        module: it.
        device: where its turns are.
        pins: whether it lies in pinned memory while it is watched.

    Attributes:
        name: of the component.
        num_bytes: what a turn takes on the device.
        is_here: whether all of it is on the device for a turn.
        gate: notes which weights are read during a turn while it does not compute.
        turns: how many there were.
        peak_bytes: the most that the device held in one.
        turn_bytes: the most that PyTorch took for a turn beyond what its tensors held before; None
            before the first.
        is_crowded: memory was out in this turn while denoisers held some.
    """

    def __init__(
        self, name: str, module: nn.Module, device: torch.device, pins: bool = False
    ) -> None:
        self.name = name
        self.module = module
        self.is_here = self.is_crowded = False
        self.turns = self.peak_bytes = 0
        self.turn_bytes: int | None = None
        self._device = device
        self.gate = TurnGate()
        self._plain: dict[nn.Module, dict[str, nn.Parameter | None]] = {}  # while it is watched
        self._pins = pins and device.type != "cpu"
        self._home: Home | None = None
        self._known: set[torch.Tensor] = set()  # when its turn began
        self._away: list[_Away] = []
        self._handles: list[RemovableHandle] = []
        self._calls: dict[str, Callable[..., Any]] = {}

    @property
    def num_bytes(self) -> int:
        """Return the bytes that are not on the device yet."""
        return sum(t.nbytes for t in self._tensors() if t.device != self._device)

    @property
    def weight_bytes(self) -> int:
        """Return the bytes of its parameters and buffers."""
        return sum(t.nbytes for t in self._tensors())

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def go_home(self) -> None:
        """Go to the host's memory for good: from there it comes for its turns."""
        for tensor in self._tensors():
            if tensor.device == self._device:
                _C.set_data(tensor, tensor.detach().cpu())

    def report(self) -> GuestReport:
        """Return what its turns took."""
        pinned_bytes = 0 if self._home is None else int(self._home.arena.pinned_bytes)
        return GuestReport(self.weight_bytes, pinned_bytes, self.turns, self.peak_bytes or None)

    def pin(self) -> None:
        """Have the weights as they are now come at the speed of the link. Not during a turn."""
        self.unpin()
        if self._pins:
            self._home = Home(self._tensors(), self._device)

    def unpin(self) -> None:
        """Leave the weights in ordinary memory."""
        home, self._home = self._home, None
        if home is not None:
            home.unpin()

    def watch(self, stage: Stage) -> None:
        """Tell the stage before the component, or any part of it, computes.

        A VAE is called by ``encode`` and ``decode``, past the root's hooks: its parts tell. What is
        called from outside runs again when memory was out.
        """

        def before(_module: nn.Module, _args: object) -> None:
            stage.begin(self)

        hold(self.module)
        try:
            self.pin()
            for module in self.module.modules():
                owns = next(module.parameters(recurse=False), None) is not None
                if owns or module is self.module:
                    self._handles.append(module.register_forward_pre_hook(before, prepend=True))
            for name in CALLS:
                method = inspect.getattr_static(type(self.module), name, None)
                if inspect.isfunction(method) and name not in vars(self.module):
                    self._calls[name] = self._guarded(name, stage)
                    setattr(self.module, name, self._calls[name])
        except BaseException:
            self.unwatch()
            raise

    def _guarded(self, name: str, stage: Stage) -> Callable[..., Any]:
        """Return a method of the component that computes under the cap, again if memory was out."""
        module = self.module

        @functools.wraps(getattr(module, name))
        def call(*args: Any, **kwargs: Any) -> Any:
            # Looked up at each call: tools exchange the methods of classes.
            method = getattr(type(module), name)
            if torch.compiler.is_compiling():
                return method(module, *args, **kwargs)
            attempt, still = Attempt((args, kwargs), self._device), Stillness(module)

            def can_repeat() -> bool:
                return still.holds() and attempt.is_untouched()

            try:
                with stage.computing(self, can_repeat):
                    result = method(module, *args, **kwargs)
                stage.leave_room_for_copies(result)
                return result
            except torch.OutOfMemoryError as error:
                if not stage.relieve(error, still.holds() and attempt.rewind()):
                    raise
            return call(*args, **kwargs)  # there is more room now

        setattr(call, OURS, SimpleNamespace(forward=call))
        return call

    def unwatch(self) -> None:
        """Take the hooks off, and leave pinned memory."""
        self.unpin()
        let_go(self.module)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for name, call in self._calls.items():
            if vars(self.module).get(name) is call:
                delattr(self.module, name)
        self._calls.clear()

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def enter(self) -> None:
        """Move to the device; on failure nothing has moved."""
        tensors = self._tensors()
        self._known = set(tensors)
        moving = [tensor for tensor in tensors if tensor.device != self._device]
        moving.sort(key=lambda tensor: tensor.nbytes)  # an empty one may not be waited for
        try:
            for tensor in moving:
                home = tensor.detach()
                is_pinned = self._home is not None and self._home.holds(home)
                # The last copy is waited for, and with it all: any stream may compute with them.
                runs_on = is_pinned and tensor is not moving[-1]
                there = home.to(self._device, non_blocking=runs_on)
                # Operators write running statistics without counting a version.
                version = tensor._version if isinstance(tensor, nn.Parameter) else None
                # Noted first: what Ctrl-C finds on the device then is known to be away.
                self._away.append(_Away(tensor, home, _layout(there), version))
                _C.set_data(tensor, there)
            self.watch_reads()
            self.is_here = True
        except BaseException:
            self.leave()
            raise

    def watch_reads(self) -> None:
        """Note who reads a weight: it may be written. Not while it computes: compilers look on."""
        for module in self.module.modules() if self._away and not self._plain else ():
            if weights := weights_of(module):
                unit = Unit(len(self._plain), self.name, weights, [])
                self._plain[module] = module._parameters
                module._parameters = WatchedParameters(module._parameters, self.gate, unit)

    def unwatch_reads(self) -> None:
        """Note no reads until `watch_reads`."""
        unwatch(self._plain)
        self._plain.clear()

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def leave(self) -> None:
        """Go back to where the tensors were; what came in meanwhile goes with them.

        What a failing device does not give back is as it came, and the error raised at the end.
        """
        failure: RuntimeError | None = None
        self.is_here = False
        # `p.data += delta` counts no version: who read a weight may have written it.
        read = {weight for unit in self.gate.touched for weight in unit.weights}
        if self._away:
            origin = self._away[0].home.device
            for tensor in self._tensors():
                if tensor not in self._known and tensor.device == self._device:
                    _C.set_data(tensor, tensor.detach().to(origin))
        while self._away:
            away = self._away[-1]
            if away.tensor.device == self._device:  # else somebody moved it: theirs from now on
                try:
                    values = self._values_of(away, away.tensor in read)
                except RuntimeError as error:
                    failure, values = failure or error, away.home
                _C.set_data(away.tensor, values)
            self._away.pop()
        self.gate.touched.clear()
        self._known.clear()
        self.unwatch_reads()
        if failure is not None:
            raise failure

    def _values_of(self, away: _Away, is_read: bool) -> torch.Tensor:
        """Return what a tensor is in host memory after a turn."""
        tensor, home = away.tensor, away.home
        if _layout(tensor) == away.layout:
            if is_read or tensor._version != away.version:
                home.copy_(tensor)
            return home
        # It was cast, say: pipelines make a VAE float32 for a call, and float16 before it ends.
        room = None if self._home is None else self._home.room_for(tensor)
        return tensor.detach().to(home.device) if room is None else room.copy_(tensor)

    def _tensors(self) -> list[torch.Tensor]:
        modules = list(self.module.modules())
        weights = dict.fromkeys(w for module in modules for w in weights_of(module))
        return [*weights, *self.module.buffers()]


def _layout(tensor: torch.Tensor) -> tuple[object, ...]:
    """Return what two tensors have in common where one can be copied into the other as it is."""
    strides = tensor.stride() if tensor.layout is torch.strided else ()
    return tensor.dtype, tensor.layout, tensor.shape, strides
