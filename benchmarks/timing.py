"""What the benchmarks time and count: steps, alone or in turns with an unhooked twin, and peaks."""

from __future__ import annotations

import itertools
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import blockswap

# Where the host sets the pace, a step drifts by a tenth within seconds on a shared machine: an
# unhooked twin runs in turns with the model, and each is timed in the later steps of its turn.
TURNS = 12
STEPS_OF_TURN = 6
UNTIMED_OF_TURN = 2


@dataclass
class Resident:
    """The unhooked model in the same process."""

    step_ms: float
    peak_allocated_bytes: int
    peak_device_bytes: int
    output: torch.Tensor


def timed_steps(model: nn.Module, inputs: dict[str, Any], steps: int) -> tuple[list[float], Any]:
    """Return ms of each step, measured between the steps' begins on the device, and the output."""
    if not torch.cuda.is_available():
        times = []
        for _ in range(steps):
            begin = time.perf_counter()
            output = model(**inputs)[0]
            times.append(1e3 * (time.perf_counter() - begin))
        return times, output
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    for mark in marks[:-1]:
        mark.record()
        output = model(**inputs)[0]
    marks[-1].record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in itertools.pairwise(marks)], output


def measure_resident(model: nn.Module, inputs: dict[str, Any], steps: int) -> Resident:
    """Time the unhooked model on its device."""
    timed_steps(model, inputs, 3)
    reset_peaks()
    times, output = timed_steps(model, inputs, steps)
    allocated, reserved = peaks()
    return Resident(statistics.median(times), allocated, reserved, output.clone())


def timed_turns(
    model: nn.Module, twin: nn.Module, inputs: dict[str, Any]
) -> tuple[list[float], list[float], Any]:
    """Return ms of each timed step of both, in turns, and the model's output."""
    times: dict[nn.Module, list[float]] = {model: [], twin: []}
    for _ in range(TURNS):
        for each in (twin, model):
            steps, output = timed_steps(each, inputs, STEPS_OF_TURN)
            times[each] += steps[UNTIMED_OF_TURN:]
    return times[model], times[twin], output


def reset_peaks() -> None:
    """Start new peaks."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()


def peaks() -> tuple[int, int]:
    """Return PyTorch's peak allocated and reserved bytes."""
    if not torch.cuda.is_available():
        return 0, 0
    return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()


class PeakWatch:
    """The larger of PyTorch's peaks over spans between which a session resets them, plus pool.

    Args:
        beside: bytes on the device that belong to neither.
    """

    def __init__(self, beside: int) -> None:
        self._beside = beside
        self.allocated = self.reserved = 0

    def sample(self, session: blockswap.Session) -> None:
        """Take PyTorch's and the pool's figures together."""
        allocated, reserved = peaks()
        pool = session.report().pool_bytes - self._beside
        self.allocated = max(self.allocated, allocated + pool)
        self.reserved = max(self.reserved, reserved + pool)


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
