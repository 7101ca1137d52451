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

# A plan that leaves no more than this share of its budget would use a larger one, too.
UNUSED_SHARE = 50


class Budget:
    """Bytes for residents and ring of one session, small parameters not counted.

    A cap bounds them once and for all. Without one, or with ``reserve``, they follow what other
    programs leave; the CPU's memory is not known, and bounds nothing.
    """

    def __init__(self, memory: DeviceMemory, config: ResolvedConfig, requests: Requests) -> None:
        self._memory = memory
        self._requests = requests
        self._cap = config.vram_bytes
        total = memory.total_bytes()
        follows = total is not None and (self._cap is None or config.reserve_bytes is not None)
        self._room = Room(total, config.reserve_bytes or 0) if total and follows else None
        self._left_at_first = max(0, (self._cap or 0) - memory.allocated_bytes())
        self._wants_more = False

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

    def of(self, learned: Learned, small_bytes: int) -> int | None:
        """Return the budget for what was learned; None: there is no bound.

        Raises:
            CapError: the cap cannot hold these activations and the smallest ring.
        """
        smallest = self._requests.largest_bytes
        granted = self._granted_now(learned, small_bytes)
        if granted is not None:
            granted = max(granted, smallest)
        learned.granted_bytes = granted
        if self._cap is None:
            return granted
        taken = learned.torch_peak_bytes + learned.spare_bytes + small_bytes + MARGIN_BYTES
        if self._cap - taken < smallest:
            raise CapError(
                f"the cap is {format_bytes(self._cap)}, but activations and weights outside the"
                f" blocks take {format_bytes(learned.torch_peak_bytes + learned.spare_bytes)} for"
                f" this input, small parameters {format_bytes(small_bytes)}, and the smallest ring"
                f" {format_bytes(smallest)}: raise vram to {format_bytes(taken + smallest)} or"
                " make the input smaller"
            )
        if granted is None:
            return self._cap - taken
        return min(self._cap - taken, granted)

    def note(self, plan: _C.Plan, learned: Learned) -> None:
        """Note the plan that is about to be installed."""
        granted = learned.granted_bytes
        left = None if granted is None else granted - plan.resident_bytes - plan.ring_bytes
        least = max(self._requests.largest_bytes, (granted or 0) // UNUSED_SHARE)
        self._wants_more = left is not None and left < least and plan.streamed_bytes > 0
        if self._room is not None:
            self._room.look_again()

    def fits(self, plan: _C.Plan, learned: Learned, small_bytes: int) -> bool:
        """Whether a plan made before fits into the room that there is now."""
        granted = self._granted_now(learned, small_bytes)
        return granted is None or plan.resident_bytes + plan.ring_bytes <= granted

    def is_off(self, learned: Learned) -> bool:
        """Whether others have taken or left so much that a new plan is due before the next step."""
        free = self._memory.free_bytes()
        if self._room is None or free is None or self._room.is_as_seen(free):
            return False
        now = self._memory.reading()
        if now is None:
            return False
        step_bytes = learned.step_bytes + learned.spare_bytes
        return self._room.is_off(now, step_bytes, self._wants_more)

    def _granted_now(self, learned: Learned, small_bytes: int) -> int | None:
        if self._room is None or (now := self._memory.reading()) is None:
            return None
        step_bytes = learned.step_bytes + learned.spare_bytes
        return self._room.budget(now, step_bytes) - small_bytes - MARGIN_BYTES
