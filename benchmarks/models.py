"""Step time over memory for whole models: `python -m benchmarks.models --help`.

Each row runs real diffusers classes with random weights under one setting, after the resident model
was measured in the same process. Writes the result schema: a head, and `rows`.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import statistics
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import blockswap
from benchmarks import zoo
from benchmarks.head import make_head
from benchmarks.timing import (
    PeakWatch,
    Resident,
    measure_resident,
    reset_peaks,
    timed_steps,
    timed_turns,
    touch_memory,
)

WARM_STEPS = 2
# Their steps are the time that the host needs to issue them: measured in turns with an unhooked
# twin, whose bytes are taken off every peak.
HOST_BOUND = ("sdxl",)
MAX_LEARNING_STEPS = 20
GIB = 2**30


@dataclass(frozen=True)
class Case:
    """One row to measure: what attach is told, beside the cap that `kept` sets.

    Attributes:
        kept: share of the leaf bytes on the device; None: as the options say.
        peak_gib: cap in GiB instead.
    """

    kept: float | None = None
    peak_gib: float | None = None
    options: dict[str, Any] = field(default_factory=dict)


# The figures that the project promises, per model.
CASES: dict[str, list[Case]] = {
    "flux": [Case(kept) for kept in (0.03, 0.2, 0.35, 0.5, 0.6, 0.7, 0.85)]
    + [
        Case(peak_gib=0.66, options={"mode": "layerwise"}),
        Case(peak_gib=0.61, options={"mode": "layerwise"}),
        *(Case(kept, options={"throttle": 25.0}) for kept in (0.2, 0.5, 0.8)),
        *(Case(kept, options={"throttle": 12.5}) for kept in (0.2, 0.5)),
    ],
    "sdxl": [Case(kept) for kept in (0.1, 0.2, 0.4, 0.5, 0.6)]
    + [Case(options={"mode": "layerwise"})],
    "wan": [Case(peak_gib=4.7)],
    "qwen": [Case(kept) for kept in (0.1, 0.3, 0.5)],
}


def measure(
    model: nn.Module,
    inputs: dict[str, Any],
    resident: Resident,
    case: Case,
    steps: int,
    twin: nn.Module | None = None,
) -> dict[str, Any]:
    """Attach under one setting, learn, time, detach; return the row."""
    beside = sum(p.nbytes for p in twin.parameters()) if twin is not None else 0
    options = dict(case.options)
    leaf_bytes = blockswap.leaf_bytes(model)
    if case.kept is not None:
        cap = resident.peak_allocated_bytes - int((1 - case.kept) * leaf_bytes)
        if torch.cuda.is_available():
            options["vram"] = cap
        else:
            options["offload"] = f"{int((1 - case.kept) * leaf_bytes)}B"
    elif case.peak_gib is not None:
        options["vram"] = int(case.peak_gib * GIB)
    if "vram" in options:
        options["vram"] += beside
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    reset_peaks()
    watch = PeakWatch(beside)
    begin = time.perf_counter()
    session = blockswap.attach(model, **options)
    setup_s = time.perf_counter() - begin
    try:
        for _ in range(MAX_LEARNING_STEPS):
            model(**inputs)
            watch.sample(session)
            if session.state == "ready":
                break
        timed_steps(model, inputs, WARM_STEPS)
        predicted_ms = session.report().predicted_ms  # fixed before the timed steps
        if twin is None:
            times, output = timed_steps(model, inputs, steps)
        else:
            times, twin_times, output = timed_turns(model, twin, inputs)
            resident = replace(resident, step_ms=statistics.median(twin_times))
        watch.sample(session)
        report = session.report()
        identical = torch.equal(output, resident.output)
    finally:
        session.detach()
    row = make_row(case, options, resident, report, watch, times, predicted_ms, setup_s, identical)
    if "vram" in options:
        row["cap_bytes"] -= beside
        row["settings"]["vram"] -= beside
    return row


def make_row(
    case: Case,
    options: dict[str, Any],
    resident: Resident,
    report: blockswap.Report,
    watch: PeakWatch,
    times: list[float],
    predicted_ms: float | None,
    setup_s: float,
    identical: bool,
) -> dict[str, Any]:
    """Return the row in the schema's words."""
    step_ms = statistics.median(times)
    link = report.throttle_gb_per_s or report.idle_link_gb_per_s
    needed_ms = (resident.peak_allocated_bytes - watch.allocated) / link / 1e6
    frontier_ms = max(resident.step_ms, needed_ms)
    return {
        "engine": "blockswap",
        "settings": options | ({"kept": case.kept} if case.kept is not None else {}),
        "status": "ok",
        "cap_bytes": report.cap_bytes,
        "peak_device_bytes": watch.reserved,
        "peak_allocated_bytes": watch.allocated,
        "peak_host_bytes": report.host_bytes,
        "weight_bytes": report.weight_bytes,
        "leaf_bytes": report.leaf_bytes,
        "resident_bytes": report.resident_bytes,
        "ring_bytes": report.ring_bytes,
        "streamed_bytes": report.streamed_bytes,
        "link_bytes": report.streamed_bytes,
        "link_gb_per_s": link,
        "resident_ms": resident.step_ms,
        "resident_peak_device_bytes": resident.peak_device_bytes,
        "resident_peak_allocated_bytes": resident.peak_allocated_bytes,
        "frontier_ms": frontier_ms,
        "law_ms": resident.step_ms + report.streamed_bytes / link / 1e6,
        "predicted_ms": predicted_ms,
        "step_ms": step_ms,
        "step_ms_min": min(times),
        "step_ms_max": max(times),
        "stall_ms": report.stall_ms,
        "efficiency": frontier_ms / step_ms,
        "setup_s": setup_s,
        "bit_identical": identical,
        "num_pieces": report.num_pieces,
        "copies_per_step": report.copies_per_step,
        "mispredicted": report.mispredicted,
    }


def run_model(
    kind: str, size: str, steps: int, cases: list[Case], device: str
) -> list[dict[str, Any]]:
    """Measure one model: resident first, then every case."""
    dtype = torch.bfloat16 if device != "cpu" else torch.float32
    model = zoo.build(kind, size, dtype, device, 0)  # type: ignore[arg-type]
    inputs = zoo.make_inputs(kind, model, device, dtype, 1)  # type: ignore[arg-type]
    rows = []
    with torch.no_grad():
        resident = measure_resident(model, inputs, steps)
        print(
            f"{kind}: resident {resident.step_ms:.1f} ms,"
            f" {resident.peak_allocated_bytes / GIB:.2f} GiB",
            flush=True,
        )
        twin = copy.deepcopy(model) if kind in HOST_BOUND else None
        model.to("cpu")
        for case in cases:
            try:
                row = measure(model, inputs, resident, case, steps, twin)
            except blockswap.BlockswapError as error:
                row = {
                    "engine": "blockswap",
                    "status": f"refused: {error}",
                    "settings": case.options | {"kept": case.kept, "gib": case.peak_gib},
                }
            row = {"model": kind, "tokens": tokens_of(inputs)} | row
            rows.append(row)
            print(one_line(row), flush=True)
    return rows


def tokens_of(inputs: dict[str, Any]) -> int:
    """Return the positions that a step works on."""
    image = inputs.get("hidden_states", inputs.get("sample"))
    assert isinstance(image, torch.Tensor)
    if image.ndim == 3:
        return int(image.shape[1])
    return int(image[0, 0].numel()) // 4


def one_line(row: dict[str, Any]) -> str:
    """Return a row for the eye."""
    if row["status"] != "ok":
        return f"{row['model']} {row['settings']}: {row['status']}"
    return (
        f"{row['model']} {row['settings']}: {row['step_ms']:.2f} ms"
        f" (predicted {row['predicted_ms'] or 0:.2f}, frontier {row['frontier_ms']:.2f},"
        f" efficiency {row['efficiency']:.4f}) peak {row['peak_allocated_bytes'] / GIB:.3f} GiB"
        f" streamed {row['streamed_bytes'] / GIB:.2f} ring {row['ring_bytes'] / 2**20:.0f} MiB,"
        f" {row['copies_per_step']}/{row['num_pieces']} pieces, stall"
        f" {row['stall_ms'] or 0:.1f} ms,"
        f" setup {row['setup_s']:.1f} s, identical {row['bit_identical']}"
    )


def main() -> None:
    """Run what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="flux,sdxl,wan,qwen")
    parser.add_argument("--size", default="full", choices=["full", "tiny"])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--cases", default="", help="numbers of cases, such as 0,3; default all")
    parser.add_argument("--touch-gib", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.touch_gib:
        touch_memory(options.touch_gib)
    result: dict[str, Any] = make_head(sys.argv) | {"rows": []}
    for kind in options.models.split(","):
        cases = CASES[kind]
        if options.cases:
            cases = [cases[int(i)] for i in options.cases.split(",") if int(i) < len(cases)]
        result["rows"] += run_model(kind, options.size, options.steps, cases, device)
        gc.collect()
        options.out.write_text(json.dumps(result, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
