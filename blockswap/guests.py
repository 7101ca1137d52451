"""Components of a pipeline that do not stream: each is on the device whole, for its turn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from blockswap import _C
from blockswap.sizes import format_bytes


@dataclass(frozen=True)
class GuestReport:
    """One component that computes whole.

    Attributes:
        weight_bytes: what it takes on the device, activations not counted.
        turns: how often it came to the device.
        peak_bytes: the most that the device held in a turn, denoisers included; None on a CPU.
        cap_bytes: what it may hold; None: no cap.
    """

    weight_bytes: int
    turns: int
    peak_bytes: int | None
    cap_bytes: int | None

    def __str__(self) -> str:
        times = "1 turn" if self.turns == 1 else f"{self.turns} turns"
        text = f"{format_bytes(self.weight_bytes)} of weights, whole on the device for {times}"
        if self.peak_bytes is None:
            return text
        text += f", peak {format_bytes(self.peak_bytes)}"
        if self.cap_bytes is None or self.peak_bytes <= self.cap_bytes:
            return text
        return (
            f"{text}: above the cap of {format_bytes(self.cap_bytes)}, which bounds its weights but"
            " not its activations; make them smaller (a VAE: enable_tiling()) or raise vram"
        )


class Guest:
    """One component: a text encoder, a VAE.

    Its tensors stay the same objects. During a turn they lie on the device, afterwards again where
    they were; what was written meanwhile is kept.

    Attributes:
        name: of the component.
        num_bytes: what a turn takes on the device.
        turns: how many there were.
        peak_bytes: the most that the device held in one.
        turn_bytes: the most that a turn took beyond what was there before; None before the first.
    """

    def __init__(self, name: str, module: nn.Module, device: torch.device) -> None:
        self.name = name
        self.module = module
        self.turns = self.peak_bytes = 0
        self.turn_bytes: int | None = None
        self._device = device
        self._away: list[tuple[torch.Tensor, torch.Tensor, int | None]] = []
        self._handles: list[RemovableHandle] = []

    @property
    def num_bytes(self) -> int:
        """Return the bytes that are not on the device yet."""
        return sum(t.nbytes for t in self._tensors() if t.device != self._device)

    def report(self, cap_bytes: int | None) -> GuestReport:
        """Return what its turns took."""
        weight_bytes = sum(t.nbytes for t in self._tensors())
        return GuestReport(weight_bytes, self.turns, self.peak_bytes or None, cap_bytes)

    def watch(self, on_use: Callable[[Guest], None]) -> None:
        """Call ``on_use`` before the component, or any part of it, computes.

        A VAE is called by ``encode`` and ``decode``, past the root's hooks: its parts tell.
        """

        def before(_module: nn.Module, _args: object) -> None:
            on_use(self)

        for module in self.module.modules():
            owns = next(module.parameters(recurse=False), None) is not None
            if owns or module is self.module:
                self._handles.append(module.register_forward_pre_hook(before, prepend=True))

    def unwatch(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @torch.no_grad()
    def enter(self) -> None:
        """Move to the device; on failure nothing has moved."""
        try:
            for tensor in self._tensors():
                if tensor.device != self._device:
                    home = tensor.detach()
                    _C.set_data(tensor, home.to(self._device))
                    # Operators write running statistics without counting a version.
                    version = tensor._version if isinstance(tensor, nn.Parameter) else None
                    self._away.append((tensor, home, version))
        except BaseException:
            self.leave()
            raise

    @torch.no_grad()
    def leave(self) -> None:
        """Go back to where the tensors were."""
        while self._away:
            tensor, home, version = self._away[-1]
            if tensor.device == self._device:  # else somebody moved it: theirs from now on
                if tensor._version != version:
                    home.copy_(tensor)
                _C.set_data(tensor, home)
            self._away.pop()

    def _tensors(self) -> list[torch.Tensor]:
        return [*self.module.parameters(), *self.module.buffers()]


class Turns:
    """Who is on the device besides the denoisers: at most one guest.

    Args:
        make_room: called before a guest comes.
        take_note: called with a guest that is there, at any time of its turn.
        on_end: called when it has left.
    """

    def __init__(
        self,
        make_room: Callable[[Guest], None],
        take_note: Callable[[Guest], None],
        on_end: Callable[[], None],
    ) -> None:
        self._make_room = make_room
        self._take_note = take_note
        self._on_end = on_end
        self._present: Guest | None = None

    def begin(self, guest: Guest) -> None:
        """It is ``guest``'s turn."""
        if self._present is guest:
            return
        self.end()
        self._make_room(guest)
        try:
            guest.enter()
        except BaseException:
            self._on_end()
            raise
        guest.turns += 1
        self._present = guest

    def note(self) -> None:
        """Note what the turn took so far."""
        if self._present is not None:
            self._take_note(self._present)

    def end(self) -> None:
        """Nobody's turn: a denoiser runs, or the pipeline's call has ended."""
        self.note()
        guest, self._present = self._present, None
        if guest is not None:
            try:
                guest.leave()
            finally:
                self._on_end()
