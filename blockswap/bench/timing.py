"""What the benchmarks time and count: steps and peaks."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

UNTIMED_STEPS = 3


@dataclass
class Resident:
    """The unhooked model in the same process."""

    step_ms: float
    peak_allocated_bytes: int
    peak_device_bytes: int
    output: torch.Tensor
    busy_step_ms: float | None = None  # while unrelated copies keep the link busy


def timed_steps(
    model: nn.Module,
    inputs: dict[str, Any],
    steps: int,
    before: Callable[[], None] | None = None,
) -> tuple[list[float], Any]:
    """Return ms of each step, measured between the steps' begins on the device, and the output.

    Args:
        model: what to run.
        inputs: its arguments.
        steps: how often.
        before: called before each step.
    """
    if not torch.cuda.is_available():
        times = []
        for _ in range(steps):
            begin = time.perf_counter()
            output = model(**inputs)[0]
            times.append(1e3 * (time.perf_counter() - begin))
        return times, output
    marks = [torch.Event("cuda", enable_timing=True) for _ in range(steps + 1)]
    for mark in marks[:-1]:
        mark.record()
        if before is not None:
            before()
        output = model(**inputs)[0]
    marks[-1].record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in itertools.pairwise(marks)], output


def measure_resident(model: nn.Module, inputs: dict[str, Any], steps: int) -> Resident:
    """Time the unhooked model on its device, with nothing in PyTorch's cache at first."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    timed_steps(model, inputs, UNTIMED_STEPS)
    reset_peaks()
    times, output = timed_steps(model, inputs, steps)
    most = peaks()
    return Resident(statistics.median(times), most.allocated, most.reserved, output.clone())


def reset_peaks() -> None:
    """Start new peaks."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()


@dataclass(frozen=True)
class Peaks:
    """The most that PyTorch held, in bytes.

    Attributes:
        allocated: by tensors.
        active: the same, and what was freed while another stream still used it.
        reserved: of the device.
    """

    allocated: int = 0
    active: int = 0
    reserved: int = 0


def peaks() -> Peaks:
    """Return PyTorch's peaks."""
    if not torch.cuda.is_available():
        return Peaks()
    return Peaks(
        torch.cuda.max_memory_allocated(),
        torch.cuda.memory_stats()["active_bytes.all.peak"],
        torch.cuda.max_memory_reserved(),
    )
