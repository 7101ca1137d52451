"""Step time over memory for whole models: `python -m benchmarks.models --help`.

Each row runs real diffusers classes with random weights under one setting, after the resident model
was measured in the same process. Writes the result schema: a head, and `rows`.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import blockswap
from benchmarks import command_line, write_rows
from benchmarks.quiet import quiet_spells
from benchmarks.turns import Twin, touch_memory
from blockswap.bench import zoo
from blockswap.bench.head import make_head
from blockswap.bench.rows import GIB, Row, measure, one_line
from blockswap.bench.timing import Resident, measure_resident
from blockswap.blocks import find_blocks
from blockswap.pieces import find_leaves

# Their steps are the time that the host needs to issue them: measured in turns with an unhooked
# twin, whose bytes and those of its copies are taken off every peak.
HOST_BOUND = ("sdxl",)


@dataclass(frozen=True)
class Case:
    """One row to measure: what attach is told, beside what `kept` or `peak_gib` set.

    Attributes:
        kept: share of the leaf bytes on the device; None: as the options say.
        peak_gib: everything streams, through a ring with which the peak is so many GiB.
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
    # What attaching costs, nothing streamed; and the least memory.
    + [Case(options={"offload": 0}), Case(options={"mode": "layerwise"})],
    "wan": [Case(peak_gib=4.7)],
    "qwen": [Case(kept) for kept in (0.1, 0.3, 0.5)],
}


def options_of(case: Case, resident: Resident, model: nn.Module) -> dict[str, Any]:
    """Return what attach is told."""
    options = dict(case.options)
    if case.kept is not None:
        streamed_bytes = int((1 - case.kept) * blockswap.leaf_bytes(model))
        if torch.cuda.is_available():
            options["vram"] = resident.peak_device_bytes - streamed_bytes
        else:
            options["offload"] = f"{streamed_bytes}B"
    elif case.peak_gib is not None:
        outside = options.get("mode") == "layerwise"
        leaves = find_leaves(model, find_blocks(model), include_outside=outside)
        streamed_bytes = sum(leaf.bytes for leaf in leaves.streamable)
        ring_bytes = int(case.peak_gib * GIB) - (resident.peak_allocated_bytes - streamed_bytes)
        options |= {"offload": "1TB", "swap_space": f"{ring_bytes}B"}
    return options


def measure_in_turns(
    model: nn.Module,
    inputs: dict[str, Any],
    resident: Resident,
    options: dict[str, Any],
    twin: Twin,
) -> Row:
    """Return the row of a model that takes turns with its unhooked twin."""
    about_turns: Row = {}

    def timer(model: nn.Module, session: blockswap.Session) -> tuple[list[float], Any, Resident]:
        turns, output = twin.take_turns(model, session.report().streamed_bytes)
        about_turns["turns"] = len(turns.model)
        about_turns["turn_ms"] = turns.medians

        def steps_of(spells: list[list[float]]) -> list[float]:
            return [ms for spell in quiet_spells(spells) for ms in spell]

        beside = replace(
            resident,
            step_ms=statistics.median(steps_of(turns.twin)),
            busy_step_ms=statistics.median(steps_of(turns.busy_twin)),
        )
        return steps_of(turns.model), output, beside

    row = measure(
        model, inputs, resident, options, 0, beside=twin.num_bytes, timer=timer, around=twin.quiet()
    )
    return row | about_turns


@torch.no_grad()
def run_model(
    kind: str, size: str, steps: int, cases: list[Case], device: str
) -> Iterator[dict[str, Any]]:
    """Measure one model, resident first, then every case; yield a row as soon as it is known."""
    dtype = torch.bfloat16 if device != "cpu" else torch.float32
    model = zoo.build(kind, size, dtype, device, 0)  # type: ignore[arg-type]
    inputs = zoo.make_inputs(kind, model, device, dtype, 1)  # type: ignore[arg-type]
    resident = measure_resident(model, inputs, steps)
    print(
        f"{kind}: resident {resident.step_ms:.1f} ms,"
        f" {resident.peak_allocated_bytes / GIB:.2f} GiB",
        flush=True,
    )
    twin = Twin(model, inputs) if kind in HOST_BOUND else None
    model.to("cpu")
    for case in cases:
        try:
            options = options_of(case, resident, model)
            if twin is None:
                row = measure(model, inputs, resident, options, steps)
            else:
                row = measure_in_turns(model, inputs, resident, options, twin)
            if case.kept is not None:
                row["settings"]["kept"] = case.kept
        except blockswap.BlockswapError as error:
            row = {
                "engine": "blockswap",
                "status": f"refused: {error}",
                "settings": case.options | {"kept": case.kept, "gib": case.peak_gib},
            }
        row = {"model": kind, "tokens": tokens_of(inputs)} | row
        print(kind, one_line(row), flush=True)
        yield row


def tokens_of(inputs: dict[str, Any]) -> int:
    """Return the positions that a step works on."""
    image = inputs.get("hidden_states", inputs.get("sample"))
    assert isinstance(image, torch.Tensor)
    if image.ndim == 3:
        return int(image.shape[1])
    return int(image[0, 0].numel()) // 4


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

    def rows() -> Iterator[Row]:
        for kind in options.models.split(","):
            cases = CASES[kind]
            if options.cases:
                cases = [cases[int(i)] for i in options.cases.split(",") if int(i) < len(cases)]
            yield from run_model(kind, options.size, options.steps, cases, device)
            gc.collect()

    write_rows(rows(), make_head(command_line(sys.argv)), options.out)


if __name__ == "__main__":
    main()
