"""The pace of a host that neighbours slow now and then."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

QUIET_SHARE = 0.25


def quiet_ms(times_ms: Sequence[float]) -> float:
    """Return the mean of the fastest quarter of some times in ms, of one at least.

    What else runs on a host only adds to a time, so that the fastest ones tell most of what was
    timed. Each program's own are taken: where those turns count in which one of them was fast, the
    others seem slower than it even if they are alike.
    """
    ordered = sorted(times_ms)
    return statistics.fmean(ordered[: max(1, int(QUIET_SHARE * len(ordered)))])
