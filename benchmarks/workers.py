"""Processes that take turns, since what each does needs a process of its own and a host drifts."""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.quiet import quiet_ms
from blockswap.bench.core import fastest_core
from blockswap.bench.rows import Row


@dataclass(frozen=True)
class Spell:
    """Asks a worker for ms of some steps, timed on a core; None: anywhere."""

    core: int | None


class Worker:
    """A process that times its model when asked; once it has failed, nothing more is asked of it.

    Args:
        row: what is known of it before.
        target: a function of the link to us and `args`. It sends a row, then ms of each step for
            each `Spell`, and for None what is known last, a row again.

    Attributes:
        row: what is known of it.
        is_alive: it has not failed.
        spells: ms of its steps, turn by turn.
    """

    def __init__(self, row: Row, target: Callable[..., None], *args: object) -> None:
        spawn = multiprocessing.get_context("spawn")  # a fork would share the parent's CUDA
        self._link, end = spawn.Pipe()
        self._process = spawn.Process(target=target, args=(end, *args), daemon=True)
        self._process.start()
        end.close()  # so that its death is heard
        self.row = row | {"status": "ok"}
        self.is_alive = True
        self.spells: list[list[float]] = []
        self.row |= self._hear() or {}

    def take_turn(self, core: int | None = None) -> None:
        """Time a spell."""
        if times := self._ask(Spell(core)):
            self.spells.append(times)

    def end(self) -> Row:
        """Return its whole row when it has ended."""
        self.row |= self._ask(None) or {}
        self._process.join()
        self._note_exit()
        if self.spells:
            steps = [ms for spell in self.spells for ms in spell]
            self.row |= {
                "step_ms": statistics.median(steps),
                "step_ms_min": min(steps),
                "step_ms_max": max(steps),
                "spells_ms": [statistics.median(spell) for spell in self.spells],
            }
        return self.row

    def _ask(self, order: Spell | None) -> Any:
        if self.is_alive:
            with contextlib.suppress(OSError):  # it has died: nothing is heard
                self._link.send(order)
        return self._hear()

    def _hear(self) -> Any:
        if not self.is_alive:
            return None
        try:
            return self._link.recv()
        except (EOFError, OSError):
            self.is_alive = False
            self._process.join()
            self._note_exit()
            return None

    def _note_exit(self) -> None:
        if self._process.exitcode:
            self.row["status"] = f"failed: exit status {self._process.exitcode}"


def compare(rows: Sequence[Row]) -> list[Row]:
    """Return the rows with each one's quiet time and output beside those of the first.

    Beside the first stands what chance does: every second of its spells over the others. If it has
    no times, nothing is claimed.
    """
    first = rows[0]
    if "spells_ms" not in first:
        return list(rows)
    spells = first["spells_ms"]

    def beside_first(row: Row) -> Row:
        if row is first:
            ratio = quiet_ms(spells[1::2] or spells) / quiet_ms(spells[::2])
        elif len(row.get("spells_ms", ())) == len(spells):
            ratio = quiet_ms(row["spells_ms"]) / quiet_ms(spells)
        else:
            return row  # it missed turns
        return row | {"step_ratio": ratio, "identical": row["sha256"] == first["sha256"]}

    return [beside_first(row) for row in rows]


def run_in_turns(workers: Sequence[Worker], turns: int, within_s: float = math.inf) -> None:
    """Time all, one after the other on the same core, so many times.

    Args:
        workers: whom to time.
        turns: how often at most.
        within_s: no turn begins later, but for the first one.
    """
    until = time.monotonic() + within_s
    for turn in range(turns):
        if turn > 0 and time.monotonic() > until:
            break
        core = fastest_core()
        for worker in workers:
            worker.take_turn(core)
