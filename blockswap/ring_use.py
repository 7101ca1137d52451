"""PURE: what the ring's bytes do over the time of a step, worked out from the step's timeline."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from blockswap.report import PieceSpan, Timeline


class RingUse(NamedTuple):
    """What the ring's bytes do from `begin_ms` until the next entry begins; the rest is free.

    A slot is filling while its copy runs, ready until compute takes it, and in use until its piece
    is released.
    """

    begin_ms: float
    filling_bytes: int
    ready_bytes: int
    in_use_bytes: int

    @property
    def held_bytes(self) -> int:
        """Bytes that hold a piece now, or a part of one."""
        return self.filling_bytes + self.ready_bytes + self.in_use_bytes


def ring_use(timeline: Timeline, ring_bytes: int | None = None) -> list[RingUse]:
    """Return a step function of time, from the first copy's begin to the step's end.

    One entry begins at 0, where the step does, and the last one at its end. What the ring holds
    then for the steps before and after was not measured: they are taken to be like this one.

    Args:
        timeline: the step.
        ring_bytes: size of the ring, which no entry exceeds; None: not known.
    """
    streamed = [span for span in timeline.spans if span.copy_ms > 0]
    begin_ms = min([0.0, *(span.copy_begin_ms for span in streamed)])
    changes: dict[float, list[int]] = defaultdict(lambda: [0, 0, 0])
    for ms in (begin_ms, 0.0, timeline.step_ms):
        changes[ms] = [0, 0, 0]
    period_ms = _period_ms(timeline, streamed)
    for shift_ms in (-period_ms, 0.0, period_ms):
        for from_ms, until_ms, state, num_bytes in _stays(streamed):
            changes[max(begin_ms, from_ms + shift_ms)][state] += num_bytes
            changes[max(begin_ms, until_ms + shift_ms)][state] -= num_bytes
    uses, states = [], [0, 0, 0]
    for ms in sorted(ms for ms in changes if ms <= timeline.step_ms):
        states = [num_bytes + change for num_bytes, change in zip(states, changes[ms], strict=True)]
        uses.append(_within(ring_bytes, RingUse(ms, *states)))
    return uses


def mean_held_bytes(uses: Sequence[RingUse]) -> float:
    """Return the mean over the step itself, without what lies before its begin."""
    byte_ms = total_ms = 0.0
    for use, following in itertools.pairwise(use for use in uses if use.begin_ms >= 0):
        byte_ms += use.held_bytes * (following.begin_ms - use.begin_ms)
        total_ms += following.begin_ms - use.begin_ms
    return byte_ms / total_ms if total_ms > 0 else 0.0


def _stays(streamed: Sequence[PieceSpan]) -> Iterator[tuple[float, float, int, int]]:
    """From when until when a slot is in which state (as `RingUse` counts them), and its bytes."""
    for span in streamed:
        # Events on two streams are stamped microseconds apart: a run may seem to begin too early.
        ready_ms = min(span.copy_end_ms, span.wait_end_ms)
        moments = (span.copy_begin_ms, ready_ms, span.wait_end_ms, span.run_end_ms)
        for state, (from_ms, until_ms) in enumerate(itertools.pairwise(moments)):
            yield from_ms, until_ms, state, span.bytes


def _period_ms(timeline: Timeline, streamed: Sequence[PieceSpan]) -> float:
    """Time from this step's begin to the next one's, at the least.

    The pause between them is not measured. But the link serves copies in order, so the next step's
    first one follows this step's last one; and no slot is refilled before its piece is released.
    """
    if not streamed:
        return timeline.step_ms
    first_ms = min(span.copy_begin_ms for span in streamed)
    last_ms = max(span.copy_end_ms for span in streamed)
    longest_ms = max(span.run_end_ms - span.copy_begin_ms for span in streamed)
    return max(timeline.step_ms, last_ms - first_ms, longest_ms)


def _within(ring_bytes: int | None, use: RingUse) -> RingUse:
    """The same, less what cannot be there yet: a fetch waits until its slot is free."""
    if ring_bytes is None:
        return use
    in_use = min(use.in_use_bytes, ring_bytes)
    ready = min(use.ready_bytes, ring_bytes - in_use)
    filling = min(use.filling_bytes, ring_bytes - in_use - ready)
    return RingUse(use.begin_ms, filling, ready, in_use)
