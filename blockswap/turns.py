"""Who is on the device beside the denoisers of a pipeline, and what it finds there."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Collection, Iterator, Sequence

import torch
from torch import nn

from blockswap.alarm import armed
from blockswap.config import ResolvedConfig
from blockswap.device_memory import DeviceMemory
from blockswap.guests import Guest
from blockswap.hooks import tensors_in
from blockswap.neighbour import Staying
from blockswap.room import cap_margin_bytes
from blockswap.session import Session
from blockswap.share import Share
from blockswap.sizes import format_bytes
from blockswap.step_memory import OTHER_ALGORITHM

logger = logging.getLogger("blockswap")

# What pipelines make of what a component returned, before the call ends: frames in [0, 1], clamped,
# stacked. It takes so many times as much, and no limit holds there.
COPIES_OF_RESULT = 4


class Turns:
    """At most one guest, or one visitor, is on the device at a time.

    The denoisers stay where they leave it enough room, and leave otherwise; they come back with
    their next step. What a guest computes with is under the cap, too.

    Args:
        denoisers: their sessions, which share the cap.
        visitors: sessions of which each has the cap for itself.
        memory: of the device.
        config: the cap, and what is left to others.
        record: called when a turn begins, with the guest's name, and with "" when it has ended.
        sharing: returns the turns of other pipelines that have a component of this one.
    """

    def __init__(
        self,
        denoisers: Sequence[Session],
        visitors: Collection[Session],
        memory: DeviceMemory,
        config: ResolvedConfig,
        record: Callable[[str], None],
        sharing: Callable[[], Collection[Turns]],
    ) -> None:
        self._denoisers = denoisers
        self._visitors = visitors
        self._streaming: Collection[Session] = ()  # those that are on the device together
        self._memory = memory
        self._cap_bytes = config.vram_bytes
        self._reserve_bytes = config.reserve_bytes or 0
        self._share = Share(memory, config.vram_bytes)
        self._record = record
        self._sharing = sharing
        self._present: Guest | None = None
        self._held_bytes = 0  # when the turn began
        self._depth = 0  # of calls within calls of the guest

    def begin(self, guest: Guest) -> None:
        """It is ``guest``'s turn."""
        if self._present is guest and guest.is_here:
            return
        self._end_others(guest.module)
        self.end()
        self._make_room(guest)
        try:
            self._come(guest)
            guest.turns += 1
            self._present = guest
        except BaseException:
            guest.leave()
            self._close()
            raise

    def stream(self, session: Session) -> None:
        """A session is about to run: those that it does not share the cap with leave.

        Denoisers stay beside a visitor that finds room enough.
        """
        if session in self._streaming:
            return  # also inside its own forward
        self._end_others()
        self.end()
        is_visitor = session in self._visitors
        group = (session,) if is_visitor else self._denoisers
        self._streaming = ()  # until all have left
        for visitor in self._visitors:
            if visitor not in group:
                visitor.vacate()
        if is_visitor:
            self._leave_room(session._steward.least_bytes())
        staying = self._denoisers if is_visitor else ()
        for other in self._sessions:
            if other not in group:
                other._state.memory.unwatch()
            elif other.state in ("learning", "ready"):
                other._state.memory.watch()
        session._state.memory.neighbours = [Staying(other) for other in staying]
        session._state.fixed.come_back()
        self._streaming = group

    def start(self) -> None:
        """Nobody computes yet: visitors have left."""
        self._streaming = ()
        for session in self._visitors:
            session.vacate()

    def note(self) -> None:
        """Note what the turn took so far, which is not the denoisers'."""
        allocated, reserved = self._memory.span_peaks()
        guest = self._present
        if guest is None or not allocated:
            return  # PyTorch may keep no count of this device
        guest.peak_bytes = max(guest.peak_bytes, reserved + self._beside_bytes())
        # Later turns find what earlier ones have cached, which is not theirs.
        is_its_own = guest.turns == 1 or guest.is_crowded
        took = (reserved if is_its_own else allocated) - self._held_bytes
        guest.turn_bytes = max(guest.turn_bytes or 0, took)

    def end(self) -> None:
        """Nobody's turn: a denoiser runs, or the pipeline's call has ended."""
        self.note()
        if self._present is not None:
            try:
                self._present.leave()
                self._present = None  # unless Ctrl-C came before: then it leaves the next time
                self._drop_cache()
            except Exception:
                self._present = None
                raise
            finally:
                self._close()

    @contextlib.contextmanager
    def computing(self, guest: Guest, can_repeat: Callable[[], bool]) -> Iterator[None]:
        """Bound what PyTorch reserves in a guest's call; calls within it change nothing."""
        self.begin(guest)
        depth, ooms = self._depth, 0
        is_outermost = depth == 0
        try:
            self._depth = depth + 1
            if is_outermost:
                beside, tally = self._beside_bytes(), self._memory.tally()
                if self._cap_bytes is not None and tally.reserved + beside > self._cap_bytes:
                    self._memory.give_back()
                self._share.impose(beside)
                guest.unwatch_reads()
                ooms = tally.ooms
            # What is called within is not what would be called again.
            watch = armed(self._memory, lambda: self._held() > 0 and can_repeat())
            with watch if is_outermost else contextlib.nullcontext():
                yield
            if is_outermost and self._memory.tally().ooms > ooms:
                logger.warning("%s: %s", guest.name, OTHER_ALGORITHM)
        finally:
            self._depth = depth
            if is_outermost:
                try:
                    guest.watch_reads()
                finally:
                    self._share.lift()

    def leave_room_for_copies(self, result: object) -> None:
        """A guest's call has returned: what PyTorch caches gives way to what is made of that."""
        if self._cap_bytes is None or self._depth:
            return
        copies = COPIES_OF_RESULT * sum(tensor.nbytes for tensor in tensors_in(result))
        if self._memory.tally().reserved + self._beside_bytes() + copies > self._cap_bytes:
            self._memory.give_back()

    def relieve(self, error: torch.OutOfMemoryError, can_repeat: bool) -> bool:
        """Memory was out in a guest's call: have the denoisers leave; whether to call again."""
        held = self._held()
        if held:
            self._vacate()
            if self._present is not None:
                self._present.is_crowded = True
            self._memory.give_back()
            self._share.refresh(self._beside_bytes())
            note = f"the denoisers have given back {format_bytes(held)}"
            logger.warning("PyTorch is out of memory in a component: %s", note)
            note += ": call again; this call could not be repeated with the same result"
        else:
            cap = "" if self._cap_bytes is None else f", {format_bytes(self._cap_bytes)} by the cap"
            note = (
                f"the component has the device to itself{cap}: make its input smaller, have a VAE"
                " work in tiles (pipe.vae.enable_tiling()), or raise vram"
            )
        repeats = held > 0 and can_repeat
        if not repeats and hasattr(error, "add_note"):  # Python 3.11
            error.add_note(note)
        return repeats

    # ---------------------------------------------------------------------------------------------

    @property
    def _sessions(self) -> Iterator[Session]:
        yield from self._denoisers
        yield from self._visitors

    def _end_others(self, module: nn.Module | None = None) -> None:
        """Have what came by another pipeline's hooks leave, but for ``module``: its turn begins."""
        for turns in self._sharing():
            if turns._present is not None and turns._present.module is not module:
                turns.end()

    def _held(self) -> int:
        """Return what the denoisers would give back."""
        return sum(session._state.memory.pool_bytes for session in self._sessions)

    def _leave_room(self, needed: int | None, counts_cache: bool = False) -> None:
        """Have the denoisers give back what who comes does not find; None: nobody knows how much.

        The last one first: those before it run earlier in the next call.

        Args:
            needed: bytes on the device.
            counts_cache: as for `_free_bytes`.
        """
        for denoiser in reversed(self._denoisers):
            free = self._free_bytes(counts_cache)
            if needed is None or free is None:
                denoiser.vacate()
            elif needed > free:
                denoiser.vacate(needed - free)

    def _make_room(self, guest: Guest) -> None:
        self._streaming = ()
        for session in self._visitors:
            session.vacate()
        # What it computes with is known after its first turn, which has the device to itself.
        needed = None if guest.turn_bytes is None else max(guest.num_bytes, guest.turn_bytes)
        free = self._free_bytes(counts_cache=True)
        if needed is None or free is None or needed > free:
            # It took as much with nothing cached: in pieces of what others cached it may take more.
            self._memory.give_back()
        self._leave_room(needed, counts_cache=True)
        for session in self._sessions:
            session._state.memory.unwatch()
        guest.is_crowded = False
        self._memory.begin_span()
        self._held_bytes = self._memory.allocated_bytes()
        self._record(guest.name)

    def _come(self, guest: Guest) -> None:
        """Bring a guest to the device under the cap; denoisers leave if they are in its way."""
        is_in_the_way = False
        try:
            self._share.impose(self._beside_bytes())
            try:
                guest.enter()
            except torch.OutOfMemoryError:
                is_in_the_way = self._held() > 0
                if not is_in_the_way:
                    raise
            if is_in_the_way:  # not in the handler: the error keeps what was on the device already
                self._vacate()
                self._memory.give_back()
                self._share.impose(self._beside_bytes())
                guest.enter()
        finally:
            self._share.lift()

    def _close(self) -> None:
        self._record("")

    def _vacate(self) -> None:
        for session in self._sessions:
            session.vacate()

    def _drop_cache(self) -> None:
        """Have PyTorch give back what a turn left cached, if that is more than a step needs.

        Else what is small and stays, such as a prompt's embeddings, lies in large pieces of it.
        """
        tally = self._memory.tally()
        is_large = tally.reserved - tally.allocated > self._memory.most_step_bytes()
        if self._cap_bytes is not None and is_large:
            self._memory.give_back()

    def _free_bytes(self, counts_cache: bool = False) -> int | None:
        """Return what a guest finds with the denoisers where they are; None: not known.

        Args:
            counts_cache: what PyTorch has cached is in use, too.
        """
        free = self._memory.available_bytes()
        if free is None:
            return None
        free -= self._reserve_bytes
        if self._cap_bytes is None:
            return free
        tally = self._memory.tally()
        used = (tally.reserved if counts_cache else tally.allocated) + self._beside_bytes()
        return min(free, self._cap_bytes - used - cap_margin_bytes(self._cap_bytes))

    def _beside_bytes(self) -> int:
        return sum(session._state.memory.pool_beside_bytes for session in self._sessions)
