"""Whole pipelines under one cap: `python -m benchmarks.pipelines --help`.

The demo's pipelines, all components with random weights, called with a prompt. The unswapped call
is timed component by component; its reserved memory gives the cap, its times the least that a call
can take: for each component the longer of its compute and of its absent bytes over the link.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import blockswap
from benchmarks import command_line
from blockswap.bench.head import make_head
from blockswap.bench.rows import GIB, Row, smallest_ring_bytes
from blockswap.components import denoisers_of
from blockswap.demo.pipelines import FAMILIES, demo_model
from blockswap.demo.weights import random_module
from blockswap.guests import CALLS
from blockswap.pipeline_report import PipelineReport
from blockswap.room import cap_that_leaves

KEPT_OF_ALL = 0.3  # of all weights: the cap, unless a component needs more
LEARNING_CALLS = 3
TIMED_CALLS = 3


@dataclass
class Phase:
    """What one component did in an unswapped call.

    Attributes:
        seconds: in all its calls.
        activation_bytes: the most that PyTorch reserved in one, beyond what it held before.
    """

    seconds: float = 0.0
    activation_bytes: int = 0


def build(family: str, size: str, device: str) -> tuple[Any, dict[str, Any]]:
    """Return a pipeline on the device and the arguments of its call."""
    import diffusers

    model = demo_model(family, size)
    seeds = iter(range(100))

    def draw(make: Callable[[], nn.Module]) -> nn.Module:
        return random_module(make, model.dtype, torch.device(device), next(seeds))

    with tempfile.TemporaryDirectory() as folder:
        parts = model.components(size == "full", draw, Path(folder))
    pipe = getattr(diffusers, model.pipeline)(**parts)
    pipe.set_progress_bar_config(disable=True)
    if hasattr(pipe.vae, "enable_tiling"):
        pipe.vae.enable_tiling()
    return pipe.to(device), {"prompt": "a red fox", "num_inference_steps": model.steps} | model.call


def draw_once(pipe: Any, call: dict[str, Any]) -> tuple[np.ndarray, float]:
    """Return the image or frames, and the seconds that the call took."""
    begin = time.perf_counter()
    made = pipe(**call, generator=torch.Generator().manual_seed(0), output_type="np")
    drawn = made.frames if hasattr(made, "frames") else made.images
    return np.asarray(drawn), time.perf_counter() - begin


@contextmanager
def timed(pipe: Any) -> Iterator[dict[str, Phase]]:
    """Time the components' calls from outside while the block runs; the host waits for each."""
    phases = {n: Phase() for n, part in pipe.components.items() if isinstance(part, nn.Module)}
    wrapped = []
    for name, phase in phases.items():
        part = pipe.components[name]
        for method in CALLS:
            if callable(getattr(type(part), method, None)):
                setattr(part, method, _timed_call(getattr(part, method), phase))
                wrapped.append((part, method))
    try:
        yield phases
    finally:
        for part, method in wrapped:
            delattr(part, method)


def _timed_call(call: Callable[..., Any], phase: Phase) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        is_gpu = torch.cuda.is_available()
        if is_gpu:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
        begin = time.perf_counter()
        output = call(*args, **kwargs)
        if is_gpu:
            torch.cuda.synchronize()
            taken = torch.cuda.max_memory_reserved() - held
            phase.activation_bytes = max(phase.activation_bytes, taken)
        phase.seconds += time.perf_counter() - begin
        return output

    return run


def cap_for(pipe: Any, phases: dict[str, Phase]) -> int:
    """Return 30 % of all weights, or what the component that needs most needs at its least."""
    modules = {n: pipe.components[n] for n in phases}
    weights = {n: sum(p.nbytes for p in m.parameters()) for n, m in modules.items()}
    needed = [KEPT_OF_ALL * sum(weights.values())]
    for name, module in modules.items():
        least = weights[name]
        if name in denoisers_of(pipe):
            least += smallest_ring_bytes(module) - blockswap.leaf_bytes(module)
        needed.append(phases[name].activation_bytes + least)
    return cap_that_leaves(int(max(needed)))


def floor_seconds(phases: dict[str, Phase], report: PipelineReport, runs: dict[str, int]) -> float:
    """Return the least that a call can take on this link with this much memory.

    Args:
        phases: of the unswapped call.
        report: says what stays and what streams.
        runs: steps of each denoiser in a call; other components run once.
    """
    speeds = [part.idle_link_gb_per_s for part in report.parts.values()]
    link = 1e9 * max(speed for speed in speeds if speed)
    seconds = 0.0
    for name, phase in phases.items():
        if name in report.guests:
            absent = report.guests[name].weight_bytes
        else:
            part = report.parts[name]
            absent = part.resident_bytes + runs.get(name, 1) * part.streamed_bytes
        seconds += max(phase.seconds, absent / link)
    return seconds


def run_family(family: str, size: str, device: str) -> Row:
    """Return one pipeline's row."""
    pipe, call = build(family, size, device)
    draw_once(pipe, call)
    expected, unswapped_s = draw_once(pipe, call)
    with timed(pipe) as phases:
        draw_once(pipe, call)
    pipe.to("cpu")
    gc.collect()
    options: dict[str, Any] = {"offload": "1TB"}
    if device != "cpu":
        torch.cuda.empty_cache()
        options = {"vram": cap_for(pipe, phases)}
    with blockswap.attach(pipe, device=device, **options) as session:
        drawn = [draw_once(pipe, call) for _ in range(LEARNING_CALLS + TIMED_CALLS)]
        report = session.report()
    peaks = [part.peak_device_bytes for part in report.parts.values()]
    peaks += [guest.peak_bytes for guest in report.guests.values()]
    call_s = statistics.median(seconds for _, seconds in drawn[LEARNING_CALLS:])
    runs = dict.fromkeys(denoisers_of(pipe), call["num_inference_steps"])
    floor_s = floor_seconds(phases, report, runs)
    return {
        "model": family,
        "engine": "blockswap",
        "settings": options | {"call": {k: v for k, v in call.items() if k != "prompt"}},
        "status": "ok",
        "cap_bytes": options.get("vram"),
        "peak_device_bytes": max((peak for peak in peaks if peak), default=0),
        "call_s": call_s,
        "first_call_s": drawn[0][1],
        "unswapped_call_s": unswapped_s,
        "floor_s": floor_s,
        "call_over_floor": call_s / floor_s,
        "phases_s": {name: phase.seconds for name, phase in phases.items()},
        "activation_bytes": {name: phase.activation_bytes for name, phase in phases.items()},
        "streamed_bytes": {name: part.streamed_bytes for name, part in report.parts.items()},
        "leaf_bytes": {name: part.leaf_bytes for name, part in report.parts.items()},
        "whole_bytes": {name: guest.weight_bytes for name, guest in report.guests.items()},
        "bit_identical": all(np.array_equal(image, expected) for image, _ in drawn),
    }


def main() -> None:
    """Measure the named families; each row is written as it comes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="sdxl,flux,wan")
    parser.add_argument("--size", default="full", choices=["full", "tiny"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    strange = [name for name in options.models.split(",") if name not in FAMILIES]
    if strange:
        parser.error(f"unknown model {strange[0]}: choose from {', '.join(FAMILIES)}")
    head, rows = make_head(command_line(sys.argv)), []
    for family in options.models.split(","):
        with torch.no_grad():
            rows.append(run_family(family, options.size, options.device))
        row = rows[-1]
        options.out.write_text(json.dumps(head | {"rows": rows}, indent=1, default=str) + "\n")
        print(
            f"{family}: {row['call_s']:.2f} s a call, least {row['floor_s']:.2f} s, unswapped"
            f" {row['unswapped_call_s']:.2f} s; cap {(row['cap_bytes'] or 0) / GIB:.2f} GiB, peak"
            f" {row['peak_device_bytes'] / GIB:.2f}; identical {row['bit_identical']}",
            flush=True,
        )
        gc.collect()


if __name__ == "__main__":
    main()
