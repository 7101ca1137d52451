"""Turns: a model whose step the host sets, beside its unhooked twin in the same seconds."""

from __future__ import annotations

import contextlib
import copy as copying
import functools
import itertools
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from benchmarks.quiet import quiet_spells
from blockswap.bench.timing import timed_steps

# Where the host sets the pace, a step drifts by a third within seconds on a shared machine. So an
# unhooked twin runs in turns with the model. Who begins a turn changes. No thread is bound to a
# core: learned on two of them, a step was predicted at 82.6 ms and took 68.9; free, 58.0 and 57.4.
STEPS_OF_SPELL = 6
UNTIMED_OF_SPELL = 2
ENOUGH_TURNS = 12
MOST_TURNS = 24
QUIET = 1.02  # of the twin's fastest spell
QUIET_WITHIN_S = 15.0
COPY_BYTES = 64 * 2**20
SOURCE_BYTES = 2 * 2**30


@dataclass
class Turns:
    """Ms of the timed steps of spells, in turns; each list as long as there were turns.

    Attributes:
        twin: unhooked, the link idle.
        busy_twin: unhooked, while as many bytes as the model streams cross the link in each step:
            what an engine without any cost of its own would reach.
        model: streamed.
    """

    twin: list[list[float]] = field(default_factory=list)
    busy_twin: list[list[float]] = field(default_factory=list)
    model: list[list[float]] = field(default_factory=list)

    @property
    def medians(self) -> list[list[float]]:
        """Return the middle of each spell: twin, busy twin and model of each turn."""
        spells = zip(self.twin, self.busy_twin, self.model, strict=True)
        return [[statistics.median(spell) for spell in turn] for turn in spells]

    @property
    def are_enough(self) -> bool:
        """Whether the twin's fastest quarter of the spells is alike, so that no more are needed."""
        if len(self.twin) < ENOUGH_TURNS:
            return False
        medians = [statistics.median(spell) for spell in quiet_spells(self.twin)]
        return medians[-1] <= QUIET * medians[0]


class Twin:
    """An unhooked copy of a model on its device, and memory for unrelated copies beside it.

    Attributes:
        model: the copy.
        num_bytes: what both hold on the device.
    """

    def __init__(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        self.model = copying.deepcopy(model)
        self.num_bytes = sum(p.nbytes for p in self.model.parameters())
        self._inputs = inputs
        self._on_gpu = torch.cuda.is_available()
        if self._on_gpu:
            self._source = torch.empty(SOURCE_BYTES, dtype=torch.uint8).pin_memory()
            self._target = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda")
            self._stream = torch.cuda.Stream(priority=-1)
            self.num_bytes += COPY_BYTES
        self._at = 0
        self._fastest_ms = math.inf

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Wait until the host is quiet, if it becomes so within some seconds."""
        until = time.monotonic() + QUIET_WITHIN_S
        for spells in itertools.count(1):
            spell_ms = statistics.median(self._spell(self.model)[0])
            self._fastest_ms = min(self._fastest_ms, spell_ms)
            if spells >= ENOUGH_TURNS and (
                spell_ms <= QUIET * self._fastest_ms or time.monotonic() > until
            ):
                break
        yield

    def take_turns(self, model: nn.Module, streamed_bytes: int) -> tuple[Turns, Any]:
        """Time the model in turns with its twin, and with the twin beside unrelated copies.

        Args:
            model: what streams.
            streamed_bytes: what its step copies.

        Returns:
            The turns, and the model's output.
        """
        copy = functools.partial(self._copy, streamed_bytes)
        turns, output = Turns(), None
        timed: list[tuple[list[list[float]], nn.Module, Callable[[], None] | None]] = [
            (turns.twin, self.model, None),
            (turns.busy_twin, self.model, copy),
            (turns.model, model, None),
        ]
        while not turns.are_enough and len(turns.model) < MOST_TURNS:
            for spells, what, before in timed:
                spell, last = self._spell(what, before)
                spells.append(spell)
                output = last if what is model else output
            timed.append(timed.pop(0))
        return turns, output

    def _spell(
        self, model: nn.Module, before: Callable[[], None] | None = None
    ) -> tuple[list[float], Any]:
        steps, output = timed_steps(model, self._inputs, STEPS_OF_SPELL, before)
        return steps[UNTIMED_OF_SPELL:], output

    def _copy(self, num_bytes: int) -> None:
        """Enqueue copies from pinned memory on a stream of their own; without a GPU, nothing."""
        if not self._on_gpu:
            return
        with torch.cuda.stream(self._stream):
            for left in range(num_bytes, 0, -COPY_BYTES):
                size = min(left, COPY_BYTES)
                self._at = self._at if self._at + size <= SOURCE_BYTES else 0
                source = self._source[self._at : self._at + size]
                self._target[:size].copy_(source, non_blocking=True)
                self._at += size


def touch_memory(gib: int) -> None:
    """Let a child process touch and free memory: the machine is slow the first time."""
    code = f"b = bytearray({gib} << 30)\nfor i in range(0, len(b), 4096): b[i] = 1"
    quick = (
        "import mmap, threading\n"
        f"m = mmap.mmap(-1, {gib} << 30)\n"
        "import numpy as np\n"
        "a = np.frombuffer(m, dtype=np.uint8)\n"
        "n = len(a) // 16\n"
        "work = lambda i: a[i * n : (i + 1) * n : 4096].fill(1)\n"
        "t = [threading.Thread(target=work, args=(i,)) for i in range(16)]\n"
        "[x.start() for x in t]; [x.join() for x in t]\n"
    )
    if subprocess.run([sys.executable, "-c", quick], check=False).returncode != 0:
        subprocess.run([sys.executable, "-c", code], check=True)
