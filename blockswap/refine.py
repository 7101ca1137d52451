"""Times of the leaves from steps under a real plan, the device's and the host's apart. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from blockswap import _C
from blockswap.learning import Learned

# A device less than this behind the host has nothing queued: a launch takes about 10 us to begin.
CAUGHT_UP_S = 100e-6
# A host more than this ahead may have filled the device's queue, and waits for it to drain.
FAR_AHEAD_S = 5e-3
# Five events in a row cost a device less, whatever else made a measured step longer.
MEASURING_AT_MOST_S = 100e-6
# Two steps under one plan differ less in a gap. In a longer one the device waited for a host that
# was held up (by Python's garbage collector, by other programs) and has caught up since.
DISTURBED_SHARE = 1.25
DISTURBED_S = 1e-3
# What a streamed piece costs the host in all, over what the engine sees of it: hooks and dispatcher
# are the rest (benchmarks/host_cost.py).
HOOKS_SHARE = 2.0


def refine(
    learned: Learned,
    times: _C.StepTimes,
    hosts: Sequence[_C.HostTimes],
    leaf_of_piece: Sequence[Sequence[int]],
    earlier: _C.StepTimes | None = None,
) -> None:
    """Scale leaf times to what steps under a real plan took, gap by gap.

    A gap lies between the moments when two streamed pieces begin to run; the leaves in it, resident
    or not, took its time on the device and on the host. Where the device had caught up with the
    host, its time is the host's, and what it computes was learned before.

    Args:
        learned: to be scaled.
        times: the device's, of a step that began with an idle device.
        hosts: the host's, of that step and some before it; gap by gap the lower quartile counts,
            of two the shorter. Empty where the host does the work itself.
        leaf_of_piece: the leaves of each piece.
        earlier: the device's, of another step under that plan; where ``times`` was disturbed, it
            counts.
    """
    position = {leaf: index for index, leaf in enumerate(learned.order)}
    gaps = _gaps(times, position, leaf_of_piece)
    others = _gaps(earlier, position, leaf_of_piece) if earlier is not None else gaps
    if [gap.start for gap in others] != [gap.start for gap in gaps]:
        others = gaps  # that step ran other pieces
    issues = _issue_seconds(hosts, len(gaps))
    leads = _leads(gaps, hosts[-1]) if issues else []
    counted = issues if len(issues) <= 2 else issues[:-1]
    undisturbed = [_undisturbed(gap) for gap in zip(*counted, strict=True)]
    copies = [HOOKS_SHARE * host.seconds_per_piece for host in hosts]
    learned.host_seconds_per_copy = _undisturbed(copies) if issues else 0.0
    calm = [_calm_seconds(gap, other) for gap, other in zip(gaps, others, strict=True)]
    lost_seconds = sum(gap.seconds for gap in gaps) - sum(calm)
    measuring = _measuring_seconds(learned, times, lost_seconds) if issues else 0.0
    for index, gap in enumerate(gaps):
        issue, is_late = 0.0, False
        if issues:
            issue = undisturbed[index]
            if leads[index] > FAR_AHEAD_S:
                issue = 0.0  # it may have waited until the device's queue had room again
            is_late = leads[index] < CAUGHT_UP_S
        leaves = learned.order[gap.start : gap.stop]
        if leaves:
            seconds = calm[index] - (learned.head_seconds if index == 0 else measuring)
            known = sum(learned.seconds.get(leaf, 0.0) for leaf in leaves)
            if not is_late or seconds < known:
                _scale(learned.seconds, leaves, max(0.0, seconds))
            _scale(learned.host_seconds, leaves, issue)
        elif index == 0:
            learned.head_host_seconds = issue
            if not is_late or calm[index] < learned.head_seconds:
                learned.head_seconds = calm[index]


@dataclass(frozen=True)
class _Gap:
    """From the begin of one streamed piece to that of the next: leaves [start, stop) of the order.

    Attributes:
        begin, end: on the device's clock; a stall lies before the begin.
    """

    start: int
    stop: int
    begin: float
    end: float

    @property
    def seconds(self) -> float:
        """Return the device's time for it."""
        return max(0.0, self.end - self.begin)


def _gaps(
    times: _C.StepTimes, position: dict[int, int], leaf_of_piece: Sequence[Sequence[int]]
) -> list[_Gap]:
    """Return the gaps of one step in order; the first one, before any leaf, may be empty."""
    spans = sorted(times.pieces, key=lambda span: span.wait_begin)
    starts = [position[leaf_of_piece[span.piece][0]] for span in spans]
    begins = [0.0, *(span.wait_end for span in spans)]
    ends = [*(span.wait_begin for span in spans), times.step_seconds]
    return [
        _Gap(*gap) for gap in zip([0, *starts], [*starts, len(position)], begins, ends, strict=True)
    ]


def _calm_seconds(gap: _Gap, other: _Gap) -> float:
    """Return the device's time for a gap; another step's, where this one was disturbed in it."""
    is_disturbed = gap.seconds > DISTURBED_SHARE * other.seconds + DISTURBED_S
    return other.seconds if is_disturbed else gap.seconds


def _measuring_seconds(learned: Learned, times: _C.StepTimes, lost_seconds: float) -> float:
    """Return what the events of one piece cost the device, where it is not hidden behind copies."""
    longer = times.step_seconds - lost_seconds - learned.unmeasured_seconds
    if not learned.unmeasured_seconds or not times.pieces or not longer > 0:
        return 0.0
    return float(min(longer / len(times.pieces), MEASURING_AT_MOST_S))


def _moments(host: _C.HostTimes) -> list[float]:
    """Return when the host came to each gap, and to the end of the step."""
    return [0.0, *sorted(moment for _, moment in host.issued), host.step_seconds]


def _own_moments(host: _C.HostTimes) -> list[float]:
    """Return the same without what it waited for fetches to be issued: that is the link's time."""
    own = (moment - waited for (_, moment), waited in zip(host.issued, host.waited, strict=True))
    return [0.0, *sorted(own), host.step_seconds - host.waiting_seconds]


def _leads(gaps: Sequence[_Gap], host: _C.HostTimes) -> list[float]:
    """Return how far the host was ahead in each gap, at its begin or end, where it was less.

    The step begins with an idle device: of the first gap only the end tells.
    """
    moments = _moments(host)
    at_begin = [gap.begin - moment for gap, moment in zip(gaps, moments, strict=False)]
    at_end = [gap.end - moment for gap, moment in zip(gaps, moments[1:], strict=True)]
    return [at_end[0], *map(min, at_begin[1:], at_end[1:])]


def _issue_seconds(hosts: Sequence[_C.HostTimes], num_gaps: int) -> list[list[float]]:
    """Return the host's time per gap, less what streaming and measuring cost, for each step.

    Steps that ran other pieces are left out; without the last one there are none.
    """
    steps: list[list[float]] = []
    for host in hosts if hosts and len(_moments(hosts[-1])) == num_gaps + 1 else ():
        moments = _own_moments(host)
        if len(moments) == num_gaps + 1:
            overhead = HOOKS_SHARE * host.seconds_per_piece + host.measuring_seconds_per_piece
            gaps = [after - before for before, after in itertools.pairwise(moments)]
            steps.append([gaps[0], *(max(0.0, seconds - overhead) for seconds in gaps[1:])])
    return steps


def _undisturbed(samples: Sequence[float]) -> float:
    """Return the lower quartile: what is longer was disturbed, and the shortest of many is luck."""
    return sorted(samples)[len(samples) // 4]


def _scale(times: dict[int, float], leaves: Sequence[int], seconds: float) -> None:
    known = sum(times.get(leaf, 0.0) for leaf in leaves)
    for leaf in leaves:
        share = times.get(leaf, 0.0) / known if known > 0 else 1 / len(leaves)
        times[leaf] = seconds * share
