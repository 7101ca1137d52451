"""A bound on pinned memory: `python -m benchmarks.host_memory --help`.

FLUX with a quarter of its weights pinned at most and everything streamed. Pinned bytes are sampled
from before attaching to the end, as blockswap counts them and as the system does; afterwards the
driver is asked for each weight. The step is set beside the staged bound, which the row explains.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import blockswap
from benchmarks import command_line
from blockswap import _C
from blockswap.bench import zoo
from blockswap.bench.head import make_head
from blockswap.bench.rows import Row, measure, one_line
from blockswap.bench.timing import Resident, measure_resident, timed_steps
from blockswap.options import SMALLEST_HOST_MEMORY

PINNED_SHARE = 4  # of the weights
SAMPLE_S = 2e-3
SLOT_BYTES = 2**24  # of the ring through which pageable weights pass, as wide as it is
NUM_SLOTS = 4
MOST_THREADS = 4  # that fill it, from a quarter of the cores
COPIED_BYTES = 4 * 2**30
BOUND = (
    "pinned bytes / link + pageable bytes / min(link, copy), or the resident step where that is"
    " longer; link: copies of 64 MiB while it idles; copy: weights copied into four slots of"
    " 16 MiB by as many threads as fill the ring, link idle"
)


def locked_bytes(status: str) -> int:
    """Return the larger of VmLck and VmPin of /proc/self/status; 0 where the system counts none.

    A driver need not tell the system what it pins.
    """
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    return max(1024 * int(fields.get(name, "0 kB").split()[0]) for name in ("VmLck", "VmPin"))


def staged_ms(
    pinned_bytes: int, pageable_bytes: int, link_gb_per_s: float, copy_gb_per_s: float
) -> float:
    """Return how long a step's copies take if pageable bytes pass through the ring one by one."""
    staged_gb_per_s = min(link_gb_per_s, copy_gb_per_s)
    return (pinned_bytes / link_gb_per_s + pageable_bytes / staged_gb_per_s) / 1e6


class PinWatch:
    """The most that was pinned at once: by blockswap's pinners, and as the system says."""

    def __init__(self) -> None:
        self.peak_bytes = self.system_peak_bytes = self.samples = 0
        self._pinners: list[_C.Pinner] = []

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Sample inside the block; every pinner that is made there is watched."""
        ends = threading.Event()
        make = _C.Pinner

        def make_watched(*args: Any) -> _C.Pinner:
            self._pinners.append(make(*args))
            return self._pinners[-1]

        def sample() -> None:
            while not ends.is_set():
                self.sample()
                time.sleep(SAMPLE_S)

        thread = threading.Thread(target=sample, daemon=True)
        _C.Pinner = make_watched
        thread.start()
        try:
            yield
        finally:
            _C.Pinner = make
            ends.set()
            thread.join()
            self.sample()

    def sample(self) -> None:
        """Look once."""
        self.samples += 1
        pinned = sum(pinner.pinned_bytes for pinner in self._pinners)
        self.peak_bytes = max(self.peak_bytes, pinned)
        status = Path("/proc/self/status")
        if status.exists():
            self.system_peak_bytes = max(self.system_peak_bytes, locked_bytes(status.read_text()))


def copy_speed(model: nn.Module) -> float:
    """Return at how many GB/s weights are copied within host memory, as into the ring's slots."""
    before = torch.get_num_threads()
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(max(1, min(MOST_THREADS, cores // 4)))
    slots = torch.zeros(NUM_SLOTS, SLOT_BYTES, dtype=torch.uint8)
    weights = [p.detach().reshape(-1).view(torch.uint8) for p in model.parameters() if p.dim() > 1]
    parts = [part for weight in weights for part in weight.split(SLOT_BYTES)]
    copied = 0
    begin = time.perf_counter()
    for number, part in enumerate(parts):
        slots[number % NUM_SLOTS, : len(part)].copy_(part)
        copied += len(part)
        if copied >= COPIED_BYTES:
            break
    seconds = time.perf_counter() - begin
    torch.set_num_threads(before)
    return copied / seconds / 1e9


def pinned_by_driver(model: nn.Module) -> int:
    """Return the bytes of the weights in host memory that the driver says are pinned."""
    return sum(p.nbytes for p in model.parameters() if p.device.type == "cpu" and p.is_pinned())


@torch.no_grad()
def run(kind: str, size: str, steps: int, device: str) -> Row:
    """Return the row."""
    dtype = torch.bfloat16 if device != "cpu" else torch.float32
    model = zoo.build(kind, size, dtype, device, 0)  # type: ignore[arg-type]
    inputs = zoo.make_inputs(kind, model, device, dtype, 1)  # type: ignore[arg-type]
    resident = measure_resident(model, inputs, steps)
    model.to("cpu")
    speed = copy_speed(model)
    weight_bytes = sum(p.nbytes for p in model.parameters())
    bound = max(weight_bytes // PINNED_SHARE, SMALLEST_HOST_MEMORY)
    options = {"offload": "1TB", "host_memory": bound}
    watch = PinWatch()
    about: Row = {}

    def timer(model: nn.Module, session: blockswap.Session) -> tuple[list[float], Any, Resident]:
        times, output = timed_steps(model, inputs, steps)
        report = session.report()
        pinned = report.pinned_bytes - report.bounce_bytes
        about.update(
            pinned_bytes=report.pinned_bytes,
            bounce_bytes=report.bounce_bytes,
            pageable_bytes=report.host_bytes - pinned,
            pinned_weight_bytes=pinned,
            pinned_by_driver_bytes=pinned_by_driver(model),
            notes=report.notes,
        )
        return times, output, resident

    with watch.running():
        row = measure(model, inputs, resident, options, steps, timer=timer)
    row |= about | {"host_memory_bytes": bound, "copy_gb_per_s": speed}
    asked = about["pinned_by_driver_bytes"] + about["bounce_bytes"]
    row |= {
        "pinned_peak_bytes": watch.peak_bytes,
        "system_peak_bytes": watch.system_peak_bytes,
        "samples": watch.samples,
        "holds": max(watch.peak_bytes, about["pinned_bytes"], asked) <= bound,
    }
    if device != "cpu":  # whose copies cross no link
        link = row["link_gb_per_s"]
        staged = staged_ms(about["pinned_weight_bytes"], about["pageable_bytes"], link, speed)
        bound_ms = max(resident.step_ms, staged)
        row |= {"staged_ms": staged, "bound_ms": bound_ms, "bound": BOUND}
        row["bound_over_step"] = bound_ms / row["step_ms"]
    return {"model": kind} | row


def main() -> None:
    """Measure one model."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--model", default="flux", choices=zoo.KINDS)
    parser.add_argument("--size", default="full", choices=["full", "tiny"])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    row = run(options.model, options.size, options.steps, device)
    print(one_line(row), flush=True)
    print(json.dumps(row, default=str), flush=True)
    head = make_head(command_line(sys.argv))
    options.out.write_text(json.dumps(head | {"rows": [row]}, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
