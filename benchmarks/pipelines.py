"""Whole pipelines under one cap: `python -m benchmarks.pipelines --help`.

The pipelines of `benchmarks.recipes`, all components with random weights, called with a prompt.
Unswapped, they say what each component takes: its memory gives the cap, its time the least that a
call can take: for each phase the longer of its compute and of its absent bytes over the link.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

import blockswap
from benchmarks import command_line, write_rows
from benchmarks.phases import Part, cap_for, floor_seconds
from benchmarks.recipes import RECIPES, Recipe, Source
from blockswap.bench.head import make_head
from blockswap.bench.rows import GIB, Row
from blockswap.components import denoisers_of
from blockswap.device_memory import DeviceMemory
from blockswap.guests import CALLS

LEAST_STREAMED = 0.5  # of each denoiser, so that a row says something
LEARNING_CALLS = 3
TIMED_CALLS = 3


def build(name: str, size: str, device: str) -> Recipe:
    """Return a pipeline, silent and on the device, and how it is called."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = RECIPES[name](Source(size == "full", torch.device(device), Path(folder)))
    recipe.pipe.set_progress_bar_config(disable=True)
    recipe.pipe.to(device)
    return recipe


def draw_once(recipe: Recipe) -> tuple[torch.Tensor, float]:
    """Return the image or the frames, in host memory, and the seconds that the call took."""
    begin = time.perf_counter()
    made = recipe.pipe(**recipe.call, generator=torch.Generator().manual_seed(0), output_type="pt")
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    return made[0].cpu(), seconds


@contextmanager
def watched(pipe: Any, what: str) -> Iterator[dict[str, Part]]:
    """Watch the components' calls from outside while the block runs; the host waits for each.

    Args:
        pipe: on the device as a whole, or attached.
        what: "memory" or "seconds": where PyTorch begins with an empty cache, calls take longer.
    """
    modules = {n: part for n, part in pipe.components.items() if isinstance(part, nn.Module)}
    parts = {n: Part(sum(p.nbytes for p in m.parameters())) for n, m in modules.items()}
    weights = sum(t.nbytes for m in modules.values() for t in [*m.parameters(), *m.buffers()])
    wrapped = []
    for name, part in parts.items():
        module = modules[name]
        for method in CALLS:
            if callable(getattr(type(module), method, None)):
                call, reads = getattr(module, method), what == "memory"
                wrapped.append((module, method, vars(module).get(method)))
                setattr(module, method, _watched_call(call, part, parts, weights, reads))
    try:
        yield parts
    finally:
        for module, method, before in wrapped:
            delattr(module, method)
            if before is not None:  # what is attached is entered through a call of blockswap's
                setattr(module, method, before)


def _watched_call(
    call: Callable[..., Any],
    part: Part,
    parts: dict[str, Part],
    weight_bytes: int,
    reads_memory: bool,
) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        is_gpu = torch.cuda.is_available()
        if is_gpu:
            torch.cuda.synchronize()
            if reads_memory:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
        mallocs = _mallocs() if is_gpu else 0
        begin = time.perf_counter()
        output = call(*args, **kwargs)
        if is_gpu:
            torch.cuda.synchronize()
        part.seconds += time.perf_counter() - begin
        part.mallocs += _mallocs() - mallocs if is_gpu else 0
        part.last = sum(other.runs for other in parts.values())
        part.first = part.first if part.runs else part.last
        part.runs += 1
        if is_gpu and reads_memory:
            allocated = torch.cuda.max_memory_allocated() - weight_bytes
            reserved = torch.cuda.max_memory_reserved() - weight_bytes
            part.activation_bytes = max(part.activation_bytes, allocated)
            part.reserved_bytes = max(part.reserved_bytes, reserved)
        return output

    return run


def _mallocs() -> int:
    """Return how often PyTorch has asked the driver for memory."""
    return int(torch.cuda.memory_stats()["num_device_alloc"])


def run_recipe(name: str, size: str, device: str) -> Row:
    """Return one pipeline's row."""
    recipe = build(name, size, device)
    pipe = recipe.pipe
    with watched(pipe, "memory") as parts:
        draw_once(recipe)
    expected, unswapped_s = draw_once(recipe)
    with watched(pipe, "seconds") as timed:
        draw_once(recipe)
    for part_name, part in parts.items():
        part.seconds = timed[part_name].seconds
    pipe.to("cpu")
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    cap_bytes = cap_for(pipe, parts)
    drawn = []
    memory = DeviceMemory(torch.device(device))
    tallies = [memory.tally()]
    with blockswap.attach(pipe, device=device, vram=cap_bytes) as session:
        for _ in range(LEARNING_CALLS + TIMED_CALLS):
            image, seconds = draw_once(recipe)
            drawn.append((torch.equal(image, expected), seconds))
            tallies.append(memory.tally())
        report = session.report()
        with watched(pipe, "seconds") as swapped:  # for the eye: where the time went
            draw_once(recipe)
    peaks = [part.peak_device_bytes for part in report.parts.values()]
    peaks += [guest.peak_bytes for guest in report.guests.values()]
    call_s = statistics.median(seconds for _, seconds in drawn[LEARNING_CALLS:])
    link = max(part.idle_link_gb_per_s or 0.0 for part in report.parts.values())
    floor_s = floor_seconds(parts, cap_bytes, 1e9 * link)
    # Denoisers stay from call to call where they can: what that leaves is a stricter measure.
    staying_floor_s = floor_seconds(parts, cap_bytes, 1e9 * link, denoisers_of(pipe))
    shares = [report.parts[n].streamed_bytes / parts[n].weight_bytes for n in denoisers_of(pipe)]
    row: Row = {
        "model": name,
        "engine": "blockswap",
        "pipeline": type(pipe).__name__,
        "dtype": str(expected.dtype).removeprefix("torch."),
        "settings": {"vram": cap_bytes, "call": _stated(recipe.call)},
        "allocator": os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or "PyTorch's own settings",
        "tiling": recipe.tiling,
        "note": recipe.note,
        "cap_bytes": cap_bytes,
        "peak_device_bytes": max((peak for peak in peaks if peak), default=0),
        "call_s": call_s,
        "first_call_s": drawn[0][1],
        "unswapped_call_s": unswapped_s,
        "floor_s": floor_s,
        "call_over_floor": call_s / floor_s,
        "staying_floor_s": staying_floor_s,
        "link_gb_per_s": link,
        "phases_s": {n: part.seconds for n, part in parts.items()},
        "swapped_phases_s": {n: part.seconds for n, part in swapped.items()},
        "swapped_mallocs": {n: part.mallocs for n, part in swapped.items()},
        "runs": {n: part.runs for n, part in parts.items()},
        "weight_bytes": {n: part.weight_bytes for n, part in parts.items()},
        "activation_bytes": {n: part.activation_bytes for n, part in parts.items()},
        "reserved_bytes": {n: part.reserved_bytes for n, part in parts.items()},
        "streamed_bytes": {n: part.streamed_bytes for n, part in report.parts.items()},
        "whole_bytes": {n: guest.weight_bytes for n, guest in report.guests.items()},
        "denoiser_streamed_share": min(shares),
        "drawn_std": expected.double().std().item(),
        "bit_identical": all(same for same, _ in drawn),
        "identical_calls": [same for same, _ in drawn],
        "calls_s": [seconds for _, seconds in drawn],
        # How often PyTorch gave its cache back to find memory in each call, and how often it found
        # none.
        "flushes": [b.flushes - a.flushes for a, b in itertools.pairwise(tallies)],
        "ooms": [b.ooms - a.ooms for a, b in itertools.pairwise(tallies)],
    }
    return row | {"status": verdict(row)}


def _stated(call: dict[str, Any]) -> dict[str, Any]:
    """Return the numbers among the arguments: a result file needs no pictures."""
    return {name: value for name, value in call.items() if isinstance(value, (int, float))}


def verdict(row: Row) -> str:
    """Return "ok", or what a row does not fulfil."""
    missed = []
    if not row["bit_identical"]:
        missed.append("another image than unswapped")
    if not row["drawn_std"] > 0:
        missed.append("the unswapped image shows nothing")
    if row["peak_device_bytes"] > row["cap_bytes"]:
        missed.append(
            f"the peak is {row['peak_device_bytes'] - row['cap_bytes']} bytes over the cap"
        )
    if row["denoiser_streamed_share"] < LEAST_STREAMED:
        missed.append(f"only {row['denoiser_streamed_share']:.0%} of a denoiser streams")
    return f"missed: {'; '.join(missed)}" if missed else "ok"


def one_line(row: Row) -> str:
    """Return a row for the eye."""
    if "call_s" not in row:
        return f"{row['model']}: {row['status']}"
    return (
        f"{row['model']}: {row['call_s']:.2f} s a call, {row['call_over_floor']:.3f} of the least"
        f" {row['floor_s']:.2f} s ({row['staying_floor_s']:.2f} s if denoisers stay), unswapped"
        f" {row['unswapped_call_s']:.2f} s; cap {row['cap_bytes'] / GIB:.2f} GiB, peak"
        f" {row['peak_device_bytes'] / GIB:.2f}; {row['denoiser_streamed_share']:.0%} streams;"
        f" identical {row['bit_identical']}; {row['status']}"
    )


def main() -> None:
    """Measure the named recipes; each row is written as it comes, also that of a failure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default=",".join(RECIPES), help=f"of {', '.join(RECIPES)}")
    parser.add_argument("--size", default="full", choices=["full", "tiny"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    names = options.models.split(",")
    strange = [name for name in names if name not in RECIPES]
    if strange:
        parser.error(f"unknown model {strange[0]}: choose from {', '.join(RECIPES)}")
    failed: list[str] = []

    def rows() -> Iterator[dict[str, Any]]:
        for name in names:
            try:
                with torch.no_grad():
                    row = run_recipe(name, options.size, options.device)
            except Exception as error:  # noqa: BLE001  # the rows of the others count
                row = {"model": name, "status": f"error: {type(error).__name__}: {error}"}
            if row["status"] != "ok":
                failed.append(name)
            print(one_line(row), flush=True)
            yield row
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    write_rows(rows(), make_head(command_line(sys.argv)), options.out)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
