"""The core on which the host's time is measured: other programs slow some of them by half."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator

ROUNDS = 10  # of some 2 ms


class Core:
    """One core for this thread: neighbours slow some of them by half.

    Threads that begin while it is bound are bound as well. Systems that bind no threads are left
    as they are.
    """

    def __init__(self) -> None:
        self._cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()

    def choose(self) -> None:
        """Move to the core that is fastest now."""

        def seconds_on(core: int) -> float:
            os.sched_setaffinity(0, {core})
            begin = time.perf_counter()
            for _ in range(ROUNDS):
                sum(range(100_000))
            return time.perf_counter() - begin

        if self._cores:
            os.sched_setaffinity(0, {min(self._cores, key=seconds_on)})

    def free(self) -> None:
        """Let the thread run anywhere again."""
        if self._cores:
            os.sched_setaffinity(0, self._cores)


@contextlib.contextmanager
def quiet_core() -> Iterator[None]:
    """Keep this thread on the core that is fastest at the block's begin."""
    core = Core()
    core.choose()
    try:
        yield
    finally:
        core.free()
