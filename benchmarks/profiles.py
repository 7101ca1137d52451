"""Plans from a recorded profile against steps that ran: `python -m benchmarks.profiles --help`.

A profile is recorded under one cap, as `blockswap demo` records it. Then the step that
`blockswap plan` expects from it under each of ten caps is compared with the one that runs there.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

import blockswap
from benchmarks import command_line
from blockswap.bench import zoo
from blockswap.bench.head import make_head
from blockswap.bench.rows import MAX_LEARNING_STEPS, Row, measure
from blockswap.bench.timing import measure_resident
from blockswap.profile import Profile

NUM_CAPS = 10
RECORDED_AT = 0.5  # of what can stream stays


def record(model: torch.nn.Module, inputs: dict[str, object], cap_bytes: int) -> Profile:
    """Return the profile of a model that learned under a cap."""
    with blockswap.attach(model, vram=cap_bytes) as session:
        for _ in range(MAX_LEARNING_STEPS):
            model(**inputs)
            if session.state == "ready":
                break
        return Profile.of(session)


def main() -> None:
    """Measure one model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="flux", choices=zoo.KINDS)
    parser.add_argument("--size", default="full", choices=["full", "tiny"])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    model = zoo.build(options.model, options.size, torch.bfloat16, options.device, 0)
    inputs = zoo.make_inputs(options.model, model, options.device, torch.bfloat16, 1)
    rows: list[Row] = []
    with torch.no_grad():
        resident = measure_resident(model, inputs, options.steps)
        model.to("cpu")
        streamed_bytes = int((1 - RECORDED_AT) * blockswap.leaf_bytes(model))
        profile = record(model, inputs, resident.peak_allocated_bytes - streamed_bytes)
        width = profile.largest_cap - profile.smallest_cap
        for index in range(NUM_CAPS):
            cap = profile.smallest_cap + width * (index + 1) // (NUM_CAPS + 1)
            expected_ms = 1e3 * profile.plan(cap)[0].predicted_seconds
            row = measure(model, inputs, resident, {"vram": cap}, options.steps)
            row |= {"model": options.model, "expected_ms": expected_ms}
            row["expected_over_step"] = expected_ms / row["step_ms"]
            rows.append(row)
            print(f"{cap / 2**30:.2f} GiB: {row['step_ms']:.1f} ms, expected", end=" ")
            print(f"{expected_ms:.1f} ({row['expected_over_step']:.3f})", flush=True)
    head = make_head(command_line(sys.argv))
    options.out.write_text(json.dumps(head | {"rows": rows}, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
