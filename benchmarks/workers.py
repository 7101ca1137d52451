"""Processes that take turns, since what each does needs a process of its own and a host drifts."""

from __future__ import annotations

import enum
import multiprocessing
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from blockswap.bench.rows import Row


class Order(enum.Enum):
    """What a child does next."""

    SPELL = "time some steps"
    END = "stream no more"


class Worker:
    """A process that times its model when asked; once it has failed, nothing more is asked of it.

    Args:
        row: what is known of it before.
        target: a function of the link to us and `args`. It sends a row, then ms of each step for
            each `Order.SPELL`, and for `Order.END` what is known last, a row again.

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
        self.row |= self._answer() or {}

    def take_turn(self) -> None:
        """Time a spell."""
        if times := self._answer(Order.SPELL):
            self.spells.append(times)

    def end(self) -> Row:
        """Return its whole row when it has ended."""
        self.row |= self._answer(Order.END) or {}
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

    def _answer(self, order: Order | None = None) -> Any:
        if not self.is_alive:
            return None
        try:
            if order:
                self._link.send(order)
            return self._link.recv()
        except (EOFError, OSError):
            self.is_alive = False
            self._process.join()
            self._note_exit()
            return None

    def _note_exit(self) -> None:
        if self._process.exitcode:
            self.row["status"] = f"failed: exit status {self._process.exitcode}"


def run_in_turns(workers: Sequence[Worker], turns: int) -> None:
    """Time all, one after the other, so many times; each second turn in reverse order."""
    for turn in range(turns):
        for worker in workers if turn % 2 == 0 else reversed(workers):
            worker.take_turn()


def compare(rows: Sequence[Row]) -> list[Row]:
    """Return the rows with each one's time and output beside those of the first.

    Times are compared turn by turn; the middle one counts. If the first has none, nothing is
    claimed.
    """
    first = rows[0]
    if "spells_ms" not in first:
        return list(rows)
    return [
        row
        | {
            "step_ratio": statistics.median(
                ours / theirs
                for ours, theirs in zip(row["spells_ms"], first["spells_ms"], strict=False)
            ),
            "identical": row["sha256"] == first["sha256"],
        }
        if "spells_ms" in row
        else row
        for row in rows
    ]
