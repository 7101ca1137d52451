"""What streaming costs the host: `python -m benchmarks.host_cost --out FILE`.

1. Four blocks of small Linears, every leaf a streamed piece, bound by the host: what a step takes
   longer than unhooked, per piece, is acquire + release with their hooks.
2. SDXL under a cap: one profiled step in steady state: both ops appear for every piece, and
   nothing makes the host wait for the device.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._C._autograd import DeviceType

import blockswap
from benchmarks import command_line
from blockswap.bench import zoo
from blockswap.bench.head import make_head

WAITING_CALLS = ("Synchronize", "cudaEventQuery", "cudaMemcpy ", "cudaFree", "cudaMalloc")


def host_ms(*models: nn.Module, inputs: dict[str, Any], turns: int, steps: int) -> list[float]:
    """Return each model's host time per step: the shortest, which nothing disturbed.

    They take turns, since a shared machine drifts. The device is idle before each step and its
    queue never fills.
    """
    best = [float("inf")] * len(models)
    for _ in range(turns):
        for index, model in enumerate(models):
            for _ in range(steps):
                synchronize()
                begin = time.perf_counter()
                model(**inputs)
                best[index] = min(best[index], 1e3 * (time.perf_counter() - begin))
    return best


def synchronize() -> None:
    """Wait for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def cost_per_piece(device: str, leaves: int = 200) -> dict[str, Any]:
    """Return microseconds per streamed piece and per resident leaf."""
    blocks = [nn.Sequential(*[nn.Linear(256, 256) for _ in range(leaves // 4)]) for _ in range(4)]
    model = nn.Sequential(*blocks).requires_grad_(False)
    inputs = {"input": torch.ones(1, 256, device=device)}
    twin = copy.deepcopy(model).to(device)
    row: dict[str, Any] = {"what": "blocks of Linears", "leaves": leaves}
    settings: dict[str, dict[str, Any]] = {
        "streamed": {"offload": "1TB", "block_size": 1},
        "resident": {},
    }
    for name, options in settings.items():
        with blockswap.attach(model, device=device, **options) as session:
            for _ in range(12):
                model(**inputs)
            report = session.report()
            plain, attached = host_ms(twin, model, inputs=inputs, turns=20, steps=10)
            pieces = report.copies_per_step if name == "streamed" else leaves
            row[f"{name}_us_each"] = 1e3 * (attached - plain) / max(1, pieces)
            row[f"{name}_num"] = pieces
            row[f"{name}_plain_ms"], row[f"{name}_ms"] = plain, attached
    return row


def profile_step(kind: str, size: str, device: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return what one steady step calls, and how long each takes on the host."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = zoo.build(kind, size, dtype, device, 0)  # type: ignore[arg-type]
    inputs = zoo.make_inputs(kind, model, device, dtype, 1)  # type: ignore[arg-type]
    twin = copy.deepcopy(model)
    model.to("cpu")
    with blockswap.attach(model, device=device, **options) as session:
        for _ in range(14):
            model(**inputs)
        report = session.report()
        for _ in range(3):  # in steady state: several steps behind each other, no wait between
            model(**inputs)
        activities = [torch.profiler.ProfilerActivity.CPU]
        if device == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        with torch.profiler.profile(activities=activities) as profiler:
            model(**inputs)
        plain, attached = host_ms(twin, model, inputs=inputs, turns=10, steps=3)
    calls: Counter[str] = Counter()
    microseconds: Counter[str] = Counter()
    for event in profiler.events():
        if event.device_type == DeviceType.CPU:
            calls[event.name] += 1
            microseconds[event.name] += event.cpu_time_total
    ours = {name: calls[f"blockswap::{name}"] for name in ("acquire_", "release_")}
    # The profiler itself waits for the device when it stops.
    waits = {name: n for name, n in calls.items() if any(w in name for w in WAITING_CALLS)}
    names = [n for n in calls if n.startswith(("blockswap::", "cuda", "cu"))]
    return {
        "what": f"{kind} {options}",
        "pieces": report.copies_per_step,
        "step_ms": report.step_ms,
        "plain_host_ms": plain,
        "attached_host_ms": attached,
        "mispredicted": report.mispredicted,
        **ours,
        "waiting_calls": waits,
        "calls": {n: [calls[n], round(microseconds[n] / calls[n], 2)] for n in sorted(names)},
    }


def main() -> None:
    """Measure both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="full", choices=["full", "tiny"])
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = [{"offload": "4GiB", "block_size": "16MiB"}, {"offload": "4GiB"}]
    if options.size == "tiny":
        settings = [{"offload": "1GiB"}]
    with torch.no_grad():
        rows = [cost_per_piece(device)]
        print(json.dumps(rows[0]), flush=True)
        for setting in settings:
            rows.append(profile_step("sdxl", options.size, device, setting))
            print(json.dumps(rows[-1]), flush=True)
    options.out.write_text(
        json.dumps(make_head(command_line(sys.argv)) | {"rows": rows}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
