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
        if self._cores:
            os.sched_setaffinity(0, {min(self._cores, key=_seconds_on)})

    def free(self) -> None:
        """Let the thread run anywhere again."""
        if self._cores:
            os.sched_setaffinity(0, self._cores)


def _seconds_on(core: int) -> float:
    """Return what some work takes there; this thread is bound to it from then on."""
    os.sched_setaffinity(0, {core})
    begin = time.perf_counter()
    for _ in range(ROUNDS):
        sum(range(100_000))
    return time.perf_counter() - begin


def fastest_core() -> int | None:
    """Return the core that is fastest now; None where no thread can be bound."""
    core = Core()
    core.choose()
    bound = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    core.free()
    return min(bound, default=None)


@contextlib.contextmanager
def on_core(core: int | None) -> Iterator[None]:
    """Keep this thread there meanwhile; None: where it likes."""
    free = Core().free
    if core is not None:
        os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        free()


@contextlib.contextmanager
def quiet_core() -> Iterator[None]:
    """Keep this thread on the core that is fastest at the block's begin."""
    with on_core(fastest_core()):
        yield
