"""What a busy link costs a resident model: `python -m benchmarks.contention --out FILE`.

The unhooked model runs alone, then while unrelated pinned copies keep the host link busy on a
stream of their own. What it loses then, no engine that streams can win back.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks import zoo
from benchmarks.head import make_head
from benchmarks.models import timed_steps

MIB = 2**20


def measure(kind: str, steps: int, copy_mib: int) -> dict[str, Any]:
    """Return ms per step with the link idle and busy."""
    model = zoo.build(kind, "full", torch.bfloat16, "cuda", 0)  # type: ignore[arg-type]
    inputs = zoo.make_inputs(kind, model, "cuda", torch.bfloat16, 1)  # type: ignore[arg-type]
    source = torch.empty(copy_mib * MIB, dtype=torch.uint8).pin_memory()
    target = torch.empty(copy_mib * MIB, dtype=torch.uint8, device="cuda")
    side = torch.cuda.Stream(priority=-1)
    timed_steps(model, inputs, 5)
    idle, _ = timed_steps(model, inputs, steps)
    copies = int(steps * statistics.median(idle) * 1.4 * 55e6 / (copy_mib * MIB))
    with torch.cuda.stream(side):
        for _ in range(copies):
            target.copy_(source, non_blocking=True)
    busy, _ = timed_steps(model, inputs, steps)
    return {
        "model": kind,
        "copy_mib": copy_mib,
        "idle_ms": statistics.median(idle),
        "busy_ms": statistics.median(busy),
        "busy_over_idle": statistics.median(busy) / statistics.median(idle),
    }


def main() -> None:
    """Measure SDXL with small and large copies."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    rows = []
    with torch.no_grad():
        for copy_mib in (16, 64):
            rows.append(measure("sdxl", 20, copy_mib))
            print(json.dumps(rows[-1]), flush=True)
    options.out.write_text(json.dumps(make_head(sys.argv) | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
