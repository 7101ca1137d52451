"""The pace of a host that neighbours slow now and then.

What else runs on a host only adds to a time, so that the fastest ones tell most of what was timed.
Each program's own are taken: where those turns count in which one of them was fast, the others seem
slower than it even if they are alike.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

QUIET_SHARE = 0.25


def quiet_spells(spells: Sequence[list[float]]) -> list[list[float]]:
    """Return the fastest quarter of some spells by their medians, one at least; fastest first."""
    return sorted(spells, key=statistics.median)[: max(1, int(QUIET_SHARE * len(spells)))]


def quiet_ms(times_ms: Sequence[float]) -> float:
    """Return the mean of the fastest quarter of some times in ms, of one at least."""
    return statistics.fmean(spell[0] for spell in quiet_spells([[ms] for ms in times_ms]))
