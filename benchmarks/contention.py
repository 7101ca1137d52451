"""What a busy link costs a resident model: `python -m benchmarks.contention --out FILE`.

The unhooked model runs in turns, with the link idle and while unrelated pinned copies keep it busy
on a stream of their own. Each launch of a kernel crosses the same link: a model whose step is the
time that the host needs to issue it slows down, and no engine that streams can win that back.
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
from benchmarks.timing import STEPS_OF_TURN, UNTIMED_OF_TURN, timed_steps

MIB = 2**20
LINK_BYTES_PER_S = 55e9
SOURCES_MIB = {"link busy, from the CPU's cache": 64, "link busy, from memory": 4096}
COPY_MIB = 16


def keep_busy(source: torch.Tensor, target: torch.Tensor, side: Any, ms: float) -> None:
    """Enqueue copies for about ``ms`` on a side stream."""
    num_bytes = target.numel()
    with torch.cuda.stream(side):
        for i in range(int(ms / 1e3 * LINK_BYTES_PER_S / num_bytes)):
            begin = i * num_bytes % source.numel()
            target.copy_(source[begin : begin + num_bytes], non_blocking=True)


def measure(kind: str, turns: int) -> list[dict[str, Any]]:
    """Return ms per step with the link idle and busy."""
    model = zoo.build(kind, "full", torch.bfloat16, "cuda", 0)  # type: ignore[arg-type]
    inputs = zoo.make_inputs(kind, model, "cuda", torch.bfloat16, 1)  # type: ignore[arg-type]
    target = torch.empty(COPY_MIB * MIB, dtype=torch.uint8, device="cuda")
    side = torch.cuda.Stream(priority=-1)
    warm, _ = timed_steps(model, inputs, STEPS_OF_TURN)
    sources: dict[str, torch.Tensor | None] = {"link idle": None}
    for name, mib in SOURCES_MIB.items():
        sources[name] = torch.empty(mib * MIB, dtype=torch.uint8).pin_memory()
    times: dict[str, list[float]] = {name: [] for name in sources}
    for _ in range(turns):
        for name, source in sources.items():
            torch.cuda.synchronize()
            if source is not None:
                keep_busy(source, target, side, 1.5 * STEPS_OF_TURN * min(warm))
            steps, _ = timed_steps(model, inputs, STEPS_OF_TURN)
            times[name] += steps[UNTIMED_OF_TURN:]
    idle = times["link idle"]
    return [
        {
            "model": kind,
            "what": name,
            "step_ms": statistics.median(each),
            "step_ms_min": min(each),
            "over_idle": statistics.median(each) / statistics.median(idle),
            "over_idle_min": min(each) / min(idle),
        }
        for name, each in times.items()
    ]


def main() -> None:
    """Measure SDXL, whose small kernels the host can hardly issue in time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    with torch.no_grad():
        rows = measure("sdxl", options.turns)
    for row in rows:
        print(json.dumps(row), flush=True)
    options.out.write_text(json.dumps(make_head(sys.argv) | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
