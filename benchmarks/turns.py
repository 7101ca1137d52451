"""Turns: a model whose step the host sets, beside its unhooked twin in the same seconds."""

from __future__ import annotations

import contextlib
import copy as copying
import functools
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from blockswap.bench.timing import timed_steps

# Where the host sets the pace, a step drifts by a tenth within seconds on a shared machine: an
# unhooked twin runs in turns with the model, and each is timed in the later steps of its turn.
TURNS = 12
STEPS_OF_TURN = 6
UNTIMED_OF_TURN = 2
COPY_BYTES = 64 * 2**20
SOURCE_BYTES = 2 * 2**30


@dataclass
class Turns:
    """Ms of each timed step, taken in turns, and the model's output.

    Attributes:
        model: streamed.
        twin: unhooked, the link idle.
        busy_twin: unhooked, while as many bytes as the model streams cross the link in each step.
            What an engine without any cost of its own would reach.
    """

    model: list[float] = field(default_factory=list)
    twin: list[float] = field(default_factory=list)
    busy_twin: list[float] = field(default_factory=list)
    output: Any = None


def timed_turns(model: nn.Module, twin: Twin, inputs: dict[str, Any], streamed_bytes: int) -> Turns:
    """Time the model, its unhooked twin, and that twin beside unrelated copies."""
    turns = Turns()
    copy = functools.partial(twin.copy, streamed_bytes)
    for _ in range(TURNS):
        for module, times, before in (
            (twin.model, turns.twin, None),
            (twin.model, turns.busy_twin, copy),
            (model, turns.model, None),
        ):
            steps, turns.output = timed_steps(module, inputs, STEPS_OF_TURN, before)
            times += steps[UNTIMED_OF_TURN:]
    return turns


class Twin:
    """An unhooked copy of a model on its device, and memory for unrelated copies beside it.

    Attributes:
        model: the copy.
        num_bytes: what both hold on the device.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = copying.deepcopy(model)
        self.num_bytes = sum(p.nbytes for p in self.model.parameters())
        self._on_gpu = torch.cuda.is_available()
        if self._on_gpu:
            self._source = torch.empty(SOURCE_BYTES, dtype=torch.uint8).pin_memory()
            self._target = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda")
            self._stream = torch.cuda.Stream(priority=-1)
            self.num_bytes += COPY_BYTES
        self._at = 0

    def copy(self, num_bytes: int) -> None:
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


@contextlib.contextmanager
def quiet_core() -> Iterator[None]:
    """Bind this thread to the core that is fastest now: neighbours slow some of them by half.

    Threads that begin inside are bound to it as well.
    """
    cores = os.sched_getaffinity(0)

    def seconds_on(core: int) -> float:
        os.sched_setaffinity(0, {core})
        begin = time.perf_counter()
        for _ in range(10):
            sum(range(100_000))
        return time.perf_counter() - begin

    os.sched_setaffinity(0, {min(cores, key=seconds_on)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


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
