"""How much residents and ring may take of a device, or of a cap, whose rest is in use. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

MIB = 2**20
# Left free for the driver, for fragments and so that a neighbour's next request succeeds before the
# next step makes room for it: never less than this on a card of 8 GiB or more.
LEAST_MARGIN_BYTES = 768 * MIB
MARGIN_SHARE = 32  # of the device's memory, where that is more
MOST_MARGIN_SHARE = 10  # of a small device
# Of a cap, for what PyTorch reserves in one step and not in another: two of its larger segments.
LEAST_CAP_MARGIN_BYTES, MOST_CAP_MARGIN_BYTES = 2 * MIB, 40 * MIB
CAP_MARGIN_SHARE = 64
# Shares of the margin: fewer bytes taken or left than these move nothing. A request of 512 MiB must
# find room on a card of 8 GiB whatever was taken before: 768 * (1 - 1/4 - 1/16) > 512.
SHED_SHARE, GROW_SHARE, LOOK_SHARE = 4, 2, 16
# Steps in a row that see more room before it is taken: a neighbour may want it back.
GROW_AFTER = 2
HOLD_OFF_STEPS = 8
MOST_PATIENCE = 512  # steps


def margin_bytes(total_bytes: int) -> int:
    """Return what stays free on a device of so many bytes."""
    wanted = max(LEAST_MARGIN_BYTES, total_bytes // MARGIN_SHARE)
    return min(wanted, total_bytes // MOST_MARGIN_SHARE)


def cap_margin_bytes(cap_bytes: int) -> int:
    """Return what stays free of a cap of so many bytes."""
    wanted = min(MOST_CAP_MARGIN_BYTES, cap_bytes // CAP_MARGIN_SHARE)
    return max(LEAST_CAP_MARGIN_BYTES, wanted)


def cap_that_leaves(num_bytes: int) -> int:
    """Return the smallest cap of which so many bytes are left beside its margin."""
    share = -(-num_bytes // (CAP_MARGIN_SHARE - 1))
    return num_bytes + max(LEAST_CAP_MARGIN_BYTES, min(MOST_CAP_MARGIN_BYTES, share))


@dataclass(frozen=True)
class Reading:
    """Who holds a device's memory, or a cap's, in bytes.

    Attributes:
        unused: what there is for residents, ring and the next step: also what PyTorch has cached.
        pool: what residents, ring and small parameters take.
    """

    unused: int
    pool: int


class Verdict(Enum):
    """What a look at the memory says of the installed plan."""

    STAY = "stay"
    SHED = "shed"
    GROW = "grow"


class Room:
    """Follows free memory: gives room up at once, takes it when it stays.

    The pool changes only when free memory is off by a good part of the margin, so that what comes
    and goes in small parts moves nothing.

    Args:
        margin_bytes: to stay free.
        reserve_bytes: to leave to others on top of it.
        learns: room that was taken and had to be given up again is taken later each time.
    """

    def __init__(self, margin_bytes: int, reserve_bytes: int = 0, learns: bool = False) -> None:
        self._margin = margin_bytes
        self._keep_free = margin_bytes + reserve_bytes
        self._learns = learns
        self._patience = GROW_AFTER
        self._has_grown = False  # since it was shed last
        self._roomy_steps = 0
        self._unused_seen: int | None = None

    def budget(self, now: Reading, step_bytes: int) -> int:
        """Return what the pool may take; not positive when others leave too little.

        Args:
            now: between two steps.
            step_bytes: what PyTorch takes at the peak of a step beyond what its tensors take now.
        """
        return now.pool + now.unused - step_bytes - self._keep_free

    def is_short(self, spare_bytes: int, left_bytes: int) -> bool:
        """Whether a plan takes too much.

        Args:
            spare_bytes: of the budget that there is now, what the plan does not use; may be
                negative.
            left_bytes: the same of the budget that it was made for.
        """
        return spare_bytes < min(0, left_bytes) - self._margin // SHED_SHARE

    def is_roomy(self, spare_bytes: int, left_bytes: int) -> bool:
        """Whether there is so much more room that another plan is due; as `is_short`."""
        return spare_bytes > max(0, left_bytes) + self._margin // GROW_SHARE

    def judge(self, now: Reading, step_bytes: int, left_bytes: int, wants_more: bool) -> Verdict:
        """Say whether to plan for another budget before the next step.

        Args:
            now: as for `budget`.
            step_bytes: as for `budget`.
            left_bytes: as for `is_short`.
            wants_more: the pool would use more room if it had it.
        """
        if self._is_as_seen(now.unused):
            return Verdict.STAY
        spare = self.budget(now, step_bytes) - now.pool
        if self.is_short(spare, left_bytes):
            self._roomy_steps = 0
            if self._learns and self._has_grown:
                self._patience = min(2 * self._patience, MOST_PATIENCE)
            self._has_grown = False
            return Verdict.SHED
        if not wants_more or not self.is_roomy(spare, left_bytes):
            self._roomy_steps = 0
            return Verdict.STAY
        self._roomy_steps += 1
        if self._roomy_steps < self._patience:
            return Verdict.STAY
        self._has_grown = True
        return Verdict.GROW

    def hold_off(self) -> None:
        """Memory that seemed to be there was not: for a while, take no more."""
        self._roomy_steps = -HOLD_OFF_STEPS

    def look_again(self) -> None:
        """The pool has changed: the next look counts."""
        self._unused_seen = None
        self._roomy_steps = min(0, self._roomy_steps)

    def _is_as_seen(self, unused_bytes: int) -> bool:
        """Whether so little has changed since the last look that none is due."""
        seen, tolerance = self._unused_seen, self._margin // LOOK_SHARE
        if seen is None or self._roomy_steps or abs(unused_bytes - seen) >= tolerance:
            self._unused_seen = unused_bytes
            return False
        return True
