"""Whether a cap holds, and what it costs: `python -m benchmarks.cap_sweep --help`.

A model runs under twelve caps, from the smallest plan with a ring of 1.5 times the largest leaf to
everything resident, and under the very smallest plan. Each row holds the most that PyTorch reserved
and the pool took together, and what the driver says of the whole device beside that.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import blockswap
from benchmarks import command_line, write_rows
from benchmarks.caps import NUM_CAPS, DeviceWatch, Ends, about_cap
from benchmarks.models import tokens_of
from blockswap.bench import zoo
from blockswap.bench.core import quiet_core
from blockswap.bench.head import make_head
from blockswap.bench.rows import GIB, Row, measure, one_line, smallest_ring_bytes
from blockswap.bench.timing import Resident, measure_resident, timed_steps


def find_ends(model: nn.Module, inputs: dict[str, Any]) -> Ends:
    """Return what a step takes when nothing is kept, from some steps that keep nothing."""
    with blockswap.attach(model, offload="1TB") as session:
        for _ in range(4):
            model(**inputs)
        report = session.report()
    base = (report.peak_device_bytes or 0) - report.ring_bytes
    return Ends(base, smallest_ring_bytes(model), base + report.streamed_bytes)


@torch.no_grad()
def sweep(kind: str, size: str, steps: int, numbers: list[int], device: str) -> Iterator[Row]:
    """Measure one model under the caps of these numbers; yield a row as soon as it is known."""
    dtype = torch.bfloat16 if device != "cpu" else torch.float32
    model = zoo.build(kind, size, dtype, device, 0)  # type: ignore[arg-type]
    inputs = zoo.make_inputs(kind, model, device, dtype, 1)  # type: ignore[arg-type]
    if device != "cpu":
        # What drawing the weights left in PyTorch's cache must not count as the model's need.
        model.to("cpu")
        torch.cuda.empty_cache()
        model.to(device)
    with quiet_core():
        resident = measure_resident(model, inputs, steps)
    model.to("cpu")
    if device != "cpu":
        torch.cuda.empty_cache()  # what the resident model left there is no need of a step
    ends = find_ends(model, inputs)
    watch = DeviceWatch() if device != "cpu" else None

    def on_quiet_core(model: nn.Module, _: blockswap.Session) -> tuple[list[float], Any, Resident]:
        with quiet_core():
            return *timed_steps(model, inputs, steps), resident

    link_gb_per_s = 0.0
    for number in numbers:
        cap = ends.caps()[number]
        before = watch.beside_pytorch() if watch is not None else 0
        try:
            with watch.running() if watch is not None else contextlib.nullcontext():
                row = measure(model, inputs, resident, {"vram": cap}, steps, timer=on_quiet_core)
        except (blockswap.BlockswapError, torch.OutOfMemoryError) as error:
            row = {"engine": "blockswap", "status": f"{type(error).__name__}: {error}"}
            row["settings"] = {"vram": cap}
        link_gb_per_s = max(link_gb_per_s, row.get("link_gb_per_s", 0.0))
        row = {"model": kind, "number": number, "tokens": tokens_of(inputs)} | row
        row |= about_cap(row, link_gb_per_s)
        if watch is not None:
            row |= {"driver_peak_bytes": watch.peak_bytes, "driver_before_bytes": before}
        share = row.get("efficiency_of_cap", 0.0)
        print(f"cap {cap / GIB:.3f} GiB, efficiency {share:.3f}:", one_line(row), flush=True)
        yield row


def main() -> None:
    """Run what the command line names."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--model", default="flux", choices=["flux", "wan", "qwen", "sdxl"])
    parser.add_argument("--size", default="full", choices=["full", "tiny"])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--numbers", default="", help="of the caps, such as 0,12; default all 13")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    numbers = [int(n) for n in options.numbers.split(",") if n] or list(range(NUM_CAPS + 1))
    rows = sweep(options.model, options.size, options.steps, numbers, device)
    write_rows(rows, make_head(command_line(sys.argv)), options.out)


if __name__ == "__main__":
    main()
