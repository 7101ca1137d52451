"""What the first steps of an input shape teach: the order of leaves, their time, the activations.

    trace   one step, every leaf streamed in declared order: the order in which leaves run
    time    two steps, every leaf streamed in that order: compute time per leaf, free of the host's
            own time, since the device waits for the link
    settle  steps under the first plan: its real times, the clocks under load and the host's own
    ready   the plan made from those; predictions are fixed from here on

Pure: nothing here touches a device.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum

import torch

from blockswap import _C

TIMED_STEPS = 2
SETTLING_STEPS = 3
# A device less than this behind the host has nothing queued: a launch takes about 10 us to begin.
CAUGHT_UP_S = 100e-6
# A host more than this ahead may have filled the device's queue, and waits for it to drain.
FAR_AHEAD_S = 5e-3
# What a streamed piece costs the host in all, over what the engine sees of it: hooks and dispatcher
# are the rest (benchmarks/host_cost.py).
HOOKS_SHARE = 2.0
RELEARN_AFTER = 3  # steps in a row that did not go as planned


class Stage(Enum):
    """How far learning is for one input shape."""

    TRACE = "trace"
    TIME = "time"
    SETTLE = "settle"
    READY = "ready"


@dataclass
class Learned:
    """What is known about one input shape.

    Attributes:
        order: leaf numbers in the order in which they run; leaves that do not run are missing.
        runs: per leaf, the number of its last run among all runs of a step, and how many it has.
        seconds: per leaf, compute from its start to the start of the next one.
        head_seconds: compute before the first leaf.
        host_seconds, head_host_seconds: the host's time to issue them.
        host_seconds_per_copy: its time for one streamed piece.
        samples: steps under the first plan, each begun with an idle device.
        torch_peak_bytes: the most that PyTorch held in a step, pool excluded.
    """

    stage: Stage = Stage.TRACE
    steps: int = 0  # in this stage
    order: list[int] = field(default_factory=list)
    runs: dict[int, tuple[int, int]] = field(default_factory=dict)
    seconds: dict[int, float] = field(default_factory=dict)
    head_seconds: float = 0.0
    host_seconds: dict[int, float] = field(default_factory=dict)
    head_host_seconds: float = 0.0
    host_seconds_per_copy: float = 0.0
    samples: list[_C.StepTimes] = field(default_factory=list)
    torch_peak_bytes: int = 0
    plan: _C.Plan | None = None
    request: _C.PlanRequest | None = None
    disordered_steps: int = 0
    relearned: int = 0

    def enter(self, stage: Stage) -> None:
        """Go on to a stage."""
        self.stage, self.steps = stage, 0


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
        learned.seconds[leaf] = _shorter(learned.seconds.get(leaf, 0.0), seconds)


def refine(learned: Learned, leaf_of_piece: Sequence[Sequence[int]], is_asynchronous: bool) -> None:
    """Scale leaf times to what steps under a real plan took, gap by gap.

    A gap lies between the moments when two streamed pieces begin to run; the leaves in it, resident
    or not, took its time on the device and on the host. Where the device had caught up with the
    host, its time is the host's, and what it computes was learned before.

    Args:
        learned: to be scaled. The device times of the last of its samples count, for the clocks,
            and the median of the host's, which others disturb.
        leaf_of_piece: the leaves of each piece.
        is_asynchronous: the host issues work and does not do it itself.
    """
    position = {leaf: index for index, leaf in enumerate(learned.order)}
    gaps = [_gaps(times, position, leaf_of_piece) for times in learned.samples]
    gaps = [each for each in gaps if len(each) == len(gaps[-1])]
    own = [HOOKS_SHARE * times.host_seconds_per_piece for times in learned.samples]
    measuring = [times.measuring_seconds_per_piece for times in learned.samples]
    learned.host_seconds_per_copy = statistics.median(own) if is_asynchronous else 0.0
    overhead = learned.host_seconds_per_copy + statistics.median(measuring)
    for same in zip(*gaps, strict=True):
        gap = same[-1]
        issue = statistics.median(g.host_seconds for g in same)
        issue = max(0.0, issue - overhead if gap.has_piece else issue)
        if not is_asynchronous or gap.host_lead > FAR_AHEAD_S:
            issue = 0.0  # far ahead, it may have waited until the device's queue had room again
        leaves = learned.order[gap.start : gap.stop]
        if leaves:
            seconds = gap.seconds if gap.has_piece else gap.seconds - learned.head_seconds
            known = sum(learned.seconds.get(leaf, 0.0) for leaf in leaves)
            if not is_asynchronous or gap.host_lead > CAUGHT_UP_S or seconds < known:
                _scale(learned.seconds, leaves, max(0.0, seconds))
            _scale(learned.host_seconds, leaves, issue)
        elif not gap.has_piece:
            learned.head_seconds, learned.head_host_seconds = gap.seconds, issue


@dataclass(frozen=True)
class _Gap:
    """From the begin of one streamed piece to that of the next: leaves [start, stop) of the order.

    Attributes:
        seconds: of the device.
        host_seconds: of the host.
        host_lead: how far the host was ahead of the device, at the end where it was less.
        has_piece: it begins with a streamed piece.
    """

    start: int
    stop: int
    seconds: float
    host_seconds: float
    host_lead: float
    has_piece: bool


def _gaps(
    times: _C.StepTimes, position: dict[int, int], leaf_of_piece: Sequence[Sequence[int]]
) -> list[_Gap]:
    """Return the gaps of one step in order; the first one, before any leaf, may be empty."""
    spans = sorted(times.pieces, key=lambda span: span.wait_begin)
    starts = [position[leaf_of_piece[span.piece][0]] for span in spans]
    # Where each gap begins and ends: leaf number, device clock, host clock.
    begins = [(0, 0.0, 0.0)]
    begins += [(s, p.wait_end, p.issued) for s, p in zip(starts, spans, strict=True)]
    ends = [(s, p.wait_begin, p.issued) for s, p in zip(starts, spans, strict=True)]
    ends.append((len(position), times.step_seconds, times.host_seconds))
    return [
        _Gap(
            start=begin[0],
            stop=end[0],
            seconds=max(0.0, end[1] - begin[1]),
            host_seconds=end[2] - begin[2],
            # A step begins with an idle device: only the end of the first gap tells.
            host_lead=min(end[1] - end[2], begin[1] - begin[2] if index > 0 else math.inf),
            has_piece=index > 0,
        )
        for index, (begin, end) in enumerate(zip(begins, ends, strict=True))
    ]


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


def _scale(times: dict[int, float], leaves: Sequence[int], seconds: float) -> None:
    known = sum(times.get(leaf, 0.0) for leaf in leaves)
    for leaf in leaves:
        share = times.get(leaf, 0.0) / known if known > 0 else 1 / len(leaves)
        times[leaf] = seconds * share


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
