"""One line on the terminal while something takes long: bytes that move, or steps that run.

It writes to stderr, only when that is a terminal, and leaves nothing behind. Elsewhere (a pipe, a
notebook's log, CI) nothing is drawn; what took longer than two seconds becomes one line of logging.
It starts no thread: the line is drawn from the caller's own ticks, at most ten times a second.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Literal

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as RichProgress

from blockswap.sizes import format_bytes

logger = logging.getLogger("blockswap")

Unit = Literal["bytes", "steps"]
Tick = Callable[[int], None]

_SECONDS_BETWEEN_DRAWS = 0.1
_SECONDS_WORTH_A_LOG_LINE = 2.0


class Progress:
    """Shows how far one task is, from `with` to its end.

    Owns nothing but the line. `tick(done)` takes all that is done so far, not the difference, and
    may be called from any one thread; a tick that draws nothing costs under a microsecond.
    An exception passes through; the line is taken away and the cursor is back.

    Args:
        what: the task, in two or three words: "moving weights".
        total: bytes or steps in all.
        unit: what is counted.

    >>> with progress("moving weights", 2**20) as tick:
    ...     tick(2**20)
    """

    def __init__(self, what: str, total: int, unit: Unit = "bytes") -> None:
        self._what = what
        self._total = total
        self._unit = unit
        self._done = 0
        self._started = time.perf_counter()
        self._next_draw = 0.0
        self._bar: RichProgress | None = None

    def __enter__(self) -> Tick:
        self._started = time.perf_counter()
        if sys.stderr.isatty():
            columns: list[ProgressColumn] = [TextColumn("{task.description}"), BarColumn()]
            if self._unit == "bytes":
                columns += [DownloadColumn(binary_units=True), TransferSpeedColumn()]
            else:
                columns += [MofNCompleteColumn(), TextColumn("steps")]
            self._bar = RichProgress(
                *columns,
                TimeRemainingColumn(),
                console=Console(stderr=True),  # a console of its own: the user's may be live
                transient=True,
                auto_refresh=False,  # no thread
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._bar.add_task(self._what, total=self._total)
            self._bar.start()
            self._bar.refresh()
        return self._tick

    def _tick(self, done: int) -> None:
        self._done = done
        if self._bar is None:
            return
        now = time.perf_counter()
        if now >= self._next_draw or done >= self._total:
            self._next_draw = now + _SECONDS_BETWEEN_DRAWS
            self._bar.update(self._bar.task_ids[0], completed=done, refresh=True)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        elif kind is None:
            seconds = time.perf_counter() - self._started
            if seconds > _SECONDS_WORTH_A_LOG_LINE:
                logger.info("%s", self._describe(seconds))

    def _describe(self, seconds: float) -> str:
        if self._unit == "bytes":
            gb_per_s = self._done / seconds / 1e9
            amount = f"{format_bytes(self._done)} in {seconds:.1f} s ({gb_per_s:.2f} GB/s)"
        else:
            amount = f"{self._done} steps in {seconds:.1f} s"
        return f"{self._what}: {amount}"


def progress(what: str, total_bytes: int) -> Progress:
    """Return a `Progress` over bytes."""
    return Progress(what, total_bytes)
