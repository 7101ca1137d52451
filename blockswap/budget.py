"""What residents and ring may take: what the cap leaves, and what other programs leave."""

from __future__ import annotations

from blockswap import _C
from blockswap.config import ResolvedConfig
from blockswap.device_memory import DeviceMemory
from blockswap.errors import CapError
from blockswap.learning import Learned
from blockswap.request import MARGIN_BYTES, Requests
from blockswap.room import Room
from blockswap.sizes import format_bytes


def bytes_of(plan: _C.Plan) -> int:
    """Return what a plan takes on the device, small parameters not counted."""
    return int(plan.resident_bytes + plan.ring_bytes)


class Budget:
    """Bytes for residents and ring of one session, small parameters not counted.

    A cap bounds them once and for all. Without one, or with ``reserve``, they follow what other
    programs leave; the CPU's memory is not known, and bounds nothing.
    """

    def __init__(self, memory: DeviceMemory, config: ResolvedConfig, requests: Requests) -> None:
        self._memory = memory
        self._requests = requests
        self._cap = config.vram_bytes
        self._left_at_first = max(0, (self._cap or 0) - memory.allocated_bytes())
        total = memory.total_bytes()
        follows = total is not None and (self._cap is None or config.reserve_bytes is not None)
        self._room = Room(total, config.reserve_bytes or 0) if total and follows else None
        self._left = 0  # by the installed plan, of what others left for it
        self._wants_more = False

    @property
    def follows(self) -> bool:
        """Whether it depends on what others leave."""
        return self._room is not None

    def before_learning(self, learned: Learned) -> int | None:
        """Return what there is for ring and activations of a step that keeps nothing.

        None: no bound. 0: as little as possible, since memory was out.
        """
        if learned.spare_bytes:
            return 0
        if self._cap is not None:
            return self._left_at_first
        now = self._memory.reading()
        return None if self._room is None or now is None else max(0, self._room.budget(now, 0))

    def by_cap(self, learned: Learned, small_bytes: int) -> int | None:
        """Return what the cap leaves; None: there is no cap.

        Raises:
            CapError: it cannot hold these activations and the smallest ring.
        """
        if self._cap is None:
            return None
        smallest = self._requests.largest_bytes
        taken = learned.torch_peak_bytes + small_bytes + MARGIN_BYTES
        if self._cap - taken < smallest:
            raise CapError(
                f"the cap is {format_bytes(self._cap)}, but activations and weights outside the"
                f" blocks take {format_bytes(learned.torch_peak_bytes)} for this input, small"
                f" parameters {format_bytes(small_bytes)}, and the smallest ring"
                f" {format_bytes(smallest)}: raise vram to {format_bytes(taken + smallest)} or"
                " make the input smaller"
            )
        # What is kept free since memory was out must not make a cap impossible.
        return max(smallest, self._cap - taken - learned.spare_bytes)

    def by_others(self, learned: Learned, small_bytes: int) -> int | None:
        """Return what others leave now, perhaps nothing; None: that bounds nothing."""
        if self._room is None or (now := self._memory.reading()) is None:
            return None
        return self._room.budget(now, self._step_bytes(learned)) - small_bytes - MARGIN_BYTES

    def note(self, plan: _C.Plan, granted_bytes: int | None) -> None:
        """Note the plan that is installed.

        Args:
            plan: that one.
            granted_bytes: what others left for it.
        """
        self._left = 0 if granted_bytes is None else granted_bytes - bytes_of(plan)
        self._wants_more = plan.streamed_bytes > 0
        if self._room is not None:
            self._room.look_again()

    def hold_off(self) -> None:
        """A plan found no memory although it seemed to be there."""
        if self._room is not None:
            self._room.hold_off()

    def is_off(self, learned: Learned) -> bool:
        """Whether others have taken or left so much that a new plan is due before the next step."""
        if self._room is None or (now := self._memory.reading()) is None:
            return False
        return self._room.is_off(now, self._step_bytes(learned), self._left, self._wants_more)

    def has_room(self, learned: Learned, small_bytes: int) -> bool:
        """Whether the plan that was made could be installed now."""
        if learned.plan is None:
            return False
        if self._room is not None:
            return not self._is_short(learned, self.by_others(learned, small_bytes))
        now = self._memory.reading()
        return now is None or now.pool + now.unused >= bytes_of(learned.plan) + small_bytes

    def is_outdated(self, learned: Learned, small_bytes: int) -> bool:
        """Whether a plan that was made for another time's room is not to be installed as it is."""
        granted, then = self.by_others(learned, small_bytes), learned.granted_bytes
        if self._room is None or granted is None or learned.plan is None or then is None:
            return False
        used = bytes_of(learned.plan)
        is_roomy = self._room.is_roomy(granted - used, then - used)
        wants_more = learned.plan.streamed_bytes > 0
        return (wants_more and is_roomy) or self._is_short(learned, granted)

    def _is_short(self, learned: Learned, granted: int | None) -> bool:
        if self._room is None or granted is None or learned.plan is None:
            return False
        used = bytes_of(learned.plan)
        left = 0 if learned.granted_bytes is None else learned.granted_bytes - used
        return self._room.is_short(granted - used, left)

    def _step_bytes(self, learned: Learned) -> int:
        """Of the session on this device whose steps need most: any of them may run next."""
        self._memory.step_bytes = learned.step_bytes + learned.spare_bytes
        return self._memory.most_step_bytes()
