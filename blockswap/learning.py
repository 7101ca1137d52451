"""What the first steps of an input shape teach: the order of leaves, their time, the activations.

    trace   one step, every leaf streamed in declared order: the order in which leaves run
    time    two steps, every leaf streamed in that order: compute time per leaf, free of the host's
            own time, since the device waits for the link; if it waited for the host in the first
            one, the link is slowed for the second
    settle  steps under the first plan: its real times, the clocks under load and the host's own;
            one of them is not measured piece by piece, to tell what measuring costs; once more if
            what they teach does not explain how long they took
    ready   the plan made from those; predictions are fixed from here on

Pure: nothing here touches a device.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

import torch

from blockswap import _C

TIMED_STEPS = 2
SETTLING_STEPS = 3
# So many when the host sets the pace: it is disturbed more than a device is.
SETTLING_STEPS_OF_HOST = 6
MOST_SETTLED = 3  # times in a row
# What is learned of a step foretells that step's own time better than this, unless disturbed.
EXPLAINED_SHARE = 0.03
# After some steps in a row, a device that is done within this time waits for the host.
SHORT_LAG_S = 3e-3
# It sets the pace if issuing a step takes it this share of the step.
HOST_PACE_SHARE = 0.8
# With the link slowed to twice the host's time, a device waits for copies at every leaf.
HOST_SECONDS_OF_COPIES = 2.0
MOST_SLOWDOWN = 4.0  # each repeats a copy, which costs the host time again
RELEARN_AFTER = 3  # steps in a row that did not go as planned

# After PyTorch was out of memory: kept free beyond the peak that was seen, each time.
LEAST_SPARE_BYTES = 2**20
SPARE_SHARE = 4


class Stage(Enum):
    """How far learning is for one input shape."""

    TRACE = "trace"
    TIME = "time"
    SETTLE = "settle"
    READY = "ready"


def least(amounts: Iterable[int | None]) -> int | None:
    """Return the smallest of those that are known."""
    return min((amount for amount in amounts if amount is not None), default=None)


class Grants(NamedTuple):
    """Bytes for residents and ring. None: no such bound.

    Attributes:
        cap: what the cap leaves.
        others: what other programs leave.
    """

    cap: int | None = None
    others: int | None = None

    @property
    def least(self) -> int | None:
        """Return what both leave."""
        return least(self)


NOTHING_GRANTED = Grants()


@dataclass
class Learned:
    """What is known about one input shape.

    Attributes:
        order: leaf numbers in the order in which they run; leaves that do not run are missing.
        runs: per leaf, the number of its last run among all runs of a step, and how many it has.
        seconds: per leaf, compute from its start to the start of the next one.
        tails: per leaf, the share of that which follows its own forward.
        head_seconds: compute before the first leaf.
        host_seconds, head_host_seconds: the host's time to issue them.
        host_seconds_per_copy: its time for one streamed piece.
        settling_plan: the plan whose steps tell the following.
        hosts: the host's times of the steps under it.
        earlier_times: the device's of a measured one among them that is not the last.
        settling_steps: how many of those there are to be.
        unmeasured_seconds: of the one among them whose pieces were not measured.
        settled: how often that stage was entered since the leaves were timed.
        torch_peak_bytes: the most that PyTorch held in a step, pool excluded.
        step_bytes: how much of it came in the step.
        step_reserved_bytes: the same with what it cached.
        granted: what there was for the plan.
        arrangement: how often images had been moved when it was made.
        spare_bytes: what is kept free on top, since memory was out once.
    """

    stage: Stage = Stage.TRACE
    steps: int = 0  # in this stage
    order: list[int] = field(default_factory=list)
    runs: dict[int, tuple[int, int]] = field(default_factory=dict)
    seconds: dict[int, float] = field(default_factory=dict)
    tails: dict[int, float] = field(default_factory=dict)
    head_seconds: float = 0.0
    host_seconds: dict[int, float] = field(default_factory=dict)
    head_host_seconds: float = 0.0
    host_seconds_per_copy: float = 0.0
    settling_plan: _C.Plan | None = None
    hosts: list[_C.HostTimes] = field(default_factory=list)
    earlier_times: _C.StepTimes | None = None
    settling_steps: int = SETTLING_STEPS
    unmeasured_seconds: float = 0.0
    settled: int = 0
    torch_peak_bytes: int = 0
    step_bytes: int = 0
    step_reserved_bytes: int = 0
    spare_bytes: int = 0
    granted: Grants = NOTHING_GRANTED
    arrangement: int = 0
    plan: _C.Plan | None = None
    request: _C.PlanRequest | None = None
    disordered_steps: int = 0
    relearned: int = 0

    @property
    def fixed_bytes(self) -> int:
        """Return what PyTorch needs in all for a step, with what it caches; 0: not known."""
        return self.torch_peak_bytes - self.step_bytes + self.step_reserved_bytes + self.spare_bytes

    def is_measured_next(self, done: int) -> bool:
        """Whether the step after ``done`` ones of this stage is measured piece by piece.

        One of the steps under the first plan is not: its time tells what measuring costs.
        """
        return self.stage is not Stage.SETTLE or done != self.settling_steps - 2

    def is_last_next(self) -> bool:
        """Whether the next step is the stage's last one, which begins with an idle device."""
        return self.stage is Stage.SETTLE and self.steps == self.settling_steps - 1

    def is_paced_by_host(self) -> bool:
        """Whether the host needs most of a step's time to issue it, by one that was not measured.

        A device that had nothing to do at the step's end may have waited for the link, and a script
        that waits for each step lets no host get ahead.
        """
        own = [host.step_seconds - host.waiting_seconds for host in self.hosts]
        return bool(own) and min(own) >= HOST_PACE_SHARE * self.unmeasured_seconds

    def is_explained(self, expected_seconds: float, step_seconds: float) -> bool:
        """Whether what was learned explains a step under the first plan; else settle once more.

        Args:
            expected_seconds: of that plan, by what was learned from its steps.
            step_seconds: the shortest of them.
        """
        off = abs(expected_seconds - step_seconds)
        return self.settled >= MOST_SETTLED or off <= EXPLAINED_SHARE * step_seconds

    def note_peak(self, allocated_bytes: int, reserved_bytes: int, held_bytes: int) -> None:
        """Note what PyTorch allocated and reserved at a step's peak, and what it held before.

        Only the first step begins with an empty cache: later it may hold what others have left.
        """
        self.torch_peak_bytes = max(self.torch_peak_bytes, allocated_bytes)
        self.step_bytes = max(self.step_bytes, allocated_bytes - held_bytes)
        is_clean = self.stage is Stage.TRACE
        needed = (reserved_bytes if is_clean else allocated_bytes) - held_bytes
        self.step_reserved_bytes = max(self.step_reserved_bytes, needed)

    def forget_plan(self) -> None:
        """Memory was out: learn anew, and if it was so under a plan, keep more free than before."""
        if self.plan is not None:
            self.spare_bytes += max(LEAST_SPARE_BYTES, self.step_bytes // SPARE_SHARE)
        self.seconds.clear()
        self.enter(Stage.TRACE)

    def forget_order(self) -> None:
        """Steps keep running otherwise than learned: learn anew."""
        self.relearned += 1
        self.disordered_steps = 0
        self.seconds.clear()
        self.enter(Stage.TRACE)

    def enter(self, stage: Stage) -> None:
        """Go on to a stage; a plan of leaves that are learned anew is not theirs any more."""
        self.stage, self.steps = stage, 0
        if stage in (Stage.TRACE, Stage.TIME):
            self.plan = self.request = None
            self.settled = 0
        elif stage is Stage.SETTLE:
            self.settled += 1
        self.settling_plan = None
        self.hosts.clear()
        self.earlier_times = None
        self.settling_steps = SETTLING_STEPS


def traced_order(runs: Iterable[int]) -> list[int]:
    """Return leaf numbers by their first run."""
    return list(dict.fromkeys(runs))


def traced_runs(runs: Sequence[int]) -> dict[int, tuple[int, int]]:
    """Return, per leaf number, the position of its last run and the count of its runs."""
    counts = Counter(runs)
    return {leaf: (position, counts[leaf]) for position, leaf in enumerate(runs)}


def with_strangers(order: Sequence[int], strangers: Iterable[int]) -> list[int]:
    """Return the order with more leaves, each behind the last one that is declared before it."""
    merged = list(order)
    for leaf in sorted(strangers):
        before = [position for position, other in enumerate(merged) if other < leaf]
        merged.insert(before[-1] + 1 if before else 0, leaf)
    return merged


def take_times(
    learned: Learned, times: _C.StepTimes, leaf_of_piece: Sequence[Sequence[int]]
) -> None:
    """Note the compute time of each leaf from a step in which every leaf was a streamed piece.

    The shortest of several steps counts: what is longer was disturbed.
    """
    spans = sorted(times.pieces, key=lambda span: span.wait_begin)
    if not spans:
        return
    learned.head_seconds = _shorter(learned.head_seconds, spans[0].wait_begin)
    ends = [span.wait_begin for span in spans[1:]] + [times.step_seconds]
    for span, end in zip(spans, ends, strict=True):
        leaf = leaf_of_piece[span.piece][0]
        seconds = max(0.0, end - span.wait_end)
        known = learned.seconds.get(leaf, 0.0)
        if seconds > 0 and (known == 0 or seconds < known):
            learned.seconds[leaf] = seconds
            learned.tails[leaf] = min(1.0, max(0.0, end - span.run_end) / seconds)


def needed_slowdown(step_seconds: float, host_seconds: float, copy_seconds: float) -> float:
    """Return how many times as long copies must last so that the device never waits for the host.

    Args:
        step_seconds: of a step on the device.
        host_seconds: what the host took to issue it.
        copy_seconds: of all its copies.
    """
    if step_seconds - host_seconds > SHORT_LAG_S or copy_seconds <= 0:
        return 1.0  # it was behind the host all the time
    return min(MOST_SLOWDOWN, max(1.0, HOST_SECONDS_OF_COPIES * host_seconds / copy_seconds))


def copy_speed(times: _C.StepTimes, piece_bytes: Sequence[int], seconds_per_copy: float) -> float:
    """Return bytes per second of a step's copies, fixed cost apart; 0 when there were none."""
    seconds = 0.0
    num_bytes = 0
    for span in times.pieces:
        copied = span.copy_end - span.copy_begin
        if copied > 0:
            seconds += copied - seconds_per_copy
            num_bytes += piece_bytes[span.piece]
    return num_bytes / seconds if seconds > 0 else 0.0


def _shorter(known: float, seconds: float) -> float:
    return min(known, seconds) if known > 0 else seconds


def shape_key(args: Sequence[object], kwargs: dict[str, object]) -> tuple[object, ...]:
    """Return what makes two forwards need the same memory and time: their tensors' shapes."""
    key: list[object] = [torch.is_autocast_enabled()]
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor):
            key.append((value.shape, value.dtype))
        elif isinstance(value, (list, tuple)):
            key.extend((t.shape, t.dtype) for t in value if isinstance(t, torch.Tensor))
        elif isinstance(value, dict):
            key.extend((t.shape, t.dtype) for t in value.values() if isinstance(t, torch.Tensor))
    return tuple(key)
