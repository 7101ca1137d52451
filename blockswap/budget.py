"""What residents and ring may take: what the cap leaves, and what other programs leave."""

from __future__ import annotations

from collections.abc import Callable

from blockswap import _C
from blockswap.config import ResolvedConfig
from blockswap.device_memory import DeviceMemory, Tally
from blockswap.errors import CapError
from blockswap.learning import Grants, Learned, least
from blockswap.request import MARGIN_BYTES, Requests
from blockswap.room import Reading, Room, Verdict, cap_margin_bytes, margin_bytes
from blockswap.sizes import format_bytes

# What PyTorch reserves beyond what its tensors take at their peak, where that was not measured.
FRAGMENTS_SHARE = 20
MOST_FLUSHES = 4  # margins that are kept free for PyTorch's cache at most


def bytes_of(plan: _C.Plan) -> int:
    """Return what a plan takes on the device, small parameters not counted."""
    return int(plan.resident_bytes + plan.ring_bytes)


class Bound:
    """One bound on residents and ring.

    Args:
        room: follows what there is.
        read: says who holds it now; None: not known, nothing is bounded.
        step_bytes: says what PyTorch needs for a step beyond what its tensors hold.
    """

    def __init__(
        self,
        room: Room,
        read: Callable[[], Reading | None],
        step_bytes: Callable[[Learned], int],
    ) -> None:
        self.room = room
        self._read = read
        self._step_bytes = step_bytes
        self._left = 0  # by the installed plan

    def before_learning(self) -> int | None:
        """Return what there is for ring and activations of a step that keeps nothing."""
        now = self._read()
        return None if now is None else max(0, self.room.budget(now, 0))

    def grant(self, learned: Learned, small_bytes: int) -> int | None:
        """Return what residents and ring may take now, perhaps nothing; None: no bound."""
        now = self._read()
        if now is None:
            return None
        return self.room.budget(now, self._step_bytes(learned)) - small_bytes

    def note(self, left_bytes: int) -> None:
        """Note what the plan that is installed left of what was granted for it."""
        self._left = left_bytes
        self.room.look_again()

    def judge(self, learned: Learned, wants_more: bool, now: Reading | None = None) -> Verdict:
        """Say whether another plan is due before the next step; ``now``: what was read already."""
        now = now or self._read()
        if now is None:
            return Verdict.STAY
        return self.room.judge(now, self._step_bytes(learned), self._left, wants_more)


class Budget:
    """Bytes for residents and ring of one session, small parameters not counted.

    A cap leaves what PyTorch does not need of it. Without one, or with ``reserve``, other programs
    bound them, too. The CPU's memory is not known, and bounds nothing.

    Attributes:
        is_tight: memory was out even while everything streamed: the ring is to be the smallest.
    """

    def __init__(self, memory: DeviceMemory, config: ResolvedConfig, requests: Requests) -> None:
        self._memory = memory
        self._requests = requests
        self._cap_bytes = config.vram_bytes
        self._cap = self._others = None
        if self._cap_bytes is not None:
            room = Room(cap_margin_bytes(self._cap_bytes), learns=True)
            self._cap = Bound(room, self._read_cap, self._reserved_bytes)
        total = memory.total_bytes()
        if total and (self._cap_bytes is None or config.reserve_bytes is not None):
            room = Room(margin_bytes(total), config.reserve_bytes or 0)
            self._others = Bound(room, memory.reading, self._allocated_bytes)
        self.is_tight = False
        self._wants_more = False  # the installed plan streams
        self._tally = Tally(0, 0)  # before the forward that runs
        self._is_cramped = False  # PyTorch needs more room than the installed plan leaves

    @property
    def follows(self) -> bool:
        """Whether it depends on what others leave."""
        return self._others is not None

    def before_learning(self) -> int | None:
        """Return what there is for ring and activations of a step that keeps nothing.

        None: no bound. 0: as little as possible, since memory was out.
        """
        if self.is_tight:
            return 0
        return least(bound.before_learning() for bound in self._bounds())

    def grants(self, learned: Learned, small_bytes: int) -> Grants:
        """Return what each bound leaves now; a cap leaves at least the smallest ring."""
        cap, others = (
            None if bound is None else bound.grant(learned, small_bytes)
            for bound in (self._cap, self._others)
        )
        # What is kept free must not make a cap impossible.
        return Grants(None if cap is None else max(cap, self._requests.largest_bytes), others)

    def check(self, learned: Learned, small_bytes: int) -> None:
        """Refuse what no plan can hold; fragments on top may fit or not, which only a step tells.

        Raises:
            CapError: the cap cannot hold these activations and the smallest ring.
        """
        if self._cap_bytes is None:
            return
        smallest = self._requests.largest_bytes
        needed = self._memory.tally().allocated + learned.step_bytes
        taken = needed + small_bytes
        if self._cap_bytes - taken < smallest:
            fragments = max(0, learned.step_reserved_bytes - learned.step_bytes)
            enough = taken + fragments + smallest + MARGIN_BYTES
            raise CapError(
                f"the cap is {format_bytes(self._cap_bytes)}, but activations and weights outside"
                f" the blocks take {format_bytes(needed)} for this input, small parameters"
                f" {format_bytes(small_bytes)}, and the smallest ring {format_bytes(smallest)}:"
                f" raise vram to {format_bytes(enough)} or make the input smaller"
            )

    def note(self, plan: _C.Plan, granted: Grants) -> None:
        """Note the plan that is installed.

        Args:
            plan: that one.
            granted: what there was for it.
        """
        self._wants_more = plan.streamed_bytes > 0
        left = granted.least
        for bound in self._bounds():
            bound.note(0 if left is None else left - bytes_of(plan))

    def hold_off(self) -> None:
        """A plan found no memory although it seemed to be there."""
        for bound in self._bounds():
            bound.room.hold_off()

    def clear_for(self, num_bytes: int) -> None:
        """Have PyTorch give its cache back if that and so many bytes would pass the cap.

        The margin is for parts of pages between residents.
        """
        if self._cap_bytes is not None:
            taken = self._memory.tally().reserved + self._memory.neighbours_beside_bytes
            if taken + num_bytes > self._cap_bytes - cap_margin_bytes(self._cap_bytes):
                self._memory.give_back()

    def look(self) -> None:
        """Look at PyTorch's memory before a forward; what it caches beyond the cap goes back."""
        if self._cap_bytes is None:
            return
        self._tally = self._memory.tally()
        beside = self._memory.pool_mapped_bytes + self._memory.neighbours_beside_bytes
        if self._tally.reserved + beside > self._cap_bytes:
            self._memory.give_back()

    def is_off(self, learned: Learned) -> bool:
        """Whether another plan is due before the next step, for which `look` was called."""
        if self._is_cramped:
            self._is_cramped = False
            return True
        verdicts = []
        if self._cap is not None:
            now = self._reading_of_cap(self._tally)
            verdicts.append(self._cap.judge(learned, self._wants_more, now))
        if self._others is not None:
            verdicts.append(self._others.judge(learned, self._wants_more))
        return Verdict.SHED in verdicts or set(verdicts) == {Verdict.GROW}

    def note_flush(self, learned: Learned) -> None:
        """PyTorch found no room under its limit in a step but by giving its cache back.

        That waits for the device: the next plan leaves it more, as long as there is more to leave.
        """
        if self._cap_bytes is not None:
            margin = cap_margin_bytes(self._cap_bytes)
            most = max(learned.spare_bytes, MOST_FLUSHES * margin)
            self._is_cramped = learned.spare_bytes < most
            learned.spare_bytes = min(learned.spare_bytes + margin, most)

    def has_room(self, learned: Learned, small_bytes: int) -> bool:
        """Whether the plan that was made could be installed now."""
        if learned.plan is None:
            return False
        if self._others is not None:
            return not self.is_short(learned, small_bytes)
        now = self._memory.reading()
        return now is None or now.pool + now.unused >= bytes_of(learned.plan) + small_bytes

    def fits(self, plan: _C.Plan, learned: Learned, small_bytes: int) -> bool:
        """Whether a plan that was made for another input shape leaves this one enough room."""
        pairs = self._with(self.grants(learned, small_bytes))
        return not any(bound.room.is_short(left - bytes_of(plan), 0) for bound, left in pairs)

    def is_short(self, learned: Learned, small_bytes: int) -> bool:
        """Whether the plan that was made takes more than there is now."""
        return self._is_short(learned, self.grants(learned, small_bytes))

    def is_outdated(self, learned: Learned, small_bytes: int) -> bool:
        """Whether a plan that was made at another time is not to be installed as it is."""
        now = self.grants(learned, small_bytes)
        return self._is_roomy(learned, now) or self._is_short(learned, now)

    def has_grown_for(self, learned: Learned, small_bytes: int) -> bool:
        """Whether there is so much more room now than a plan was made for that it could grow."""
        return self._is_roomy(learned, self.grants(learned, small_bytes))

    # ---------------------------------------------------------------------------------------------

    def _bounds(self) -> list[Bound]:
        return [bound for bound in (self._cap, self._others) if bound is not None]

    def _with(self, granted: Grants) -> list[tuple[Bound, int]]:
        """Return each bound with what it leaves."""
        pairs = (self._cap, granted.cap), (self._others, granted.others)
        return [(bound, left) for bound, left in pairs if bound is not None and left is not None]

    def _is_roomy(self, learned: Learned, now: Grants) -> bool:
        then = learned.granted.least
        if learned.plan is None or then is None or not learned.plan.streamed_bytes:
            return False
        used = bytes_of(learned.plan)
        return all(
            bound.room.is_roomy(granted - used, then - used) for bound, granted in self._with(now)
        )

    def _is_short(self, learned: Learned, now: Grants) -> bool:
        then = learned.granted.least
        if learned.plan is None or then is None:
            return False
        used = bytes_of(learned.plan)
        return any(
            bound.room.is_short(granted - used, then - used) for bound, granted in self._with(now)
        )

    def _read_cap(self) -> Reading | None:
        return self._reading_of_cap(self._memory.tally())

    def _reading_of_cap(self, tally: Tally) -> Reading:
        pool = self._memory.pool_bytes
        taken = pool + self._memory.neighbours_beside_bytes + tally.allocated
        return Reading((self._cap_bytes or 0) - taken, pool)

    def _reserved_bytes(self, learned: Learned) -> int:
        self._memory.step_bytes = learned.step_bytes + learned.spare_bytes
        return learned.step_reserved_bytes + learned.spare_bytes

    def _allocated_bytes(self, learned: Learned) -> int:
        """Of the session on this device whose steps need most: any of them may run next."""
        self._memory.step_bytes = learned.step_bytes + learned.spare_bytes
        most = self._memory.most_step_bytes()
        return most + most // FRAGMENTS_SHARE
