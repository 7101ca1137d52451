"""How long attaching takes and how much host memory: `python -m benchmarks.attach --out FILE`.

FLUX lies in ordinary CPU memory. Twice: cold (memory that the machine touches for the first
time) and warm (a child process touched and freed it before). Host memory is sampled from /proc.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

import blockswap
from benchmarks import command_line
from benchmarks.turns import touch_memory
from blockswap.bench import zoo
from blockswap.bench.head import make_head

PAGE = 4096


def resident_bytes() -> int:
    """Return this process's private memory in use, without files' pages."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


class Sampler:
    """Samples host memory every millisecond on a thread."""

    def __init__(self) -> None:
        self.peak_bytes = resident_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(0.002):
            self.peak_bytes = max(self.peak_bytes, resident_bytes())

    def stop(self) -> int:
        """Return the peak."""
        self._stop.set()
        self._thread.join()
        return max(self.peak_bytes, resident_bytes())


def measure(kind: str, size: str, warm_gib: int) -> dict[str, Any]:
    """Attach once in this process; return the row."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = zoo.build(kind, size, torch.bfloat16, "cpu", 0, draw_on=device)  # type: ignore[arg-type]
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.zeros(1, device="cuda")
    if warm_gib:
        touch_memory(warm_gib)
    weight_bytes = sum(p.nbytes for p in model.parameters())
    before = resident_bytes()
    sampler = Sampler()
    begin = time.perf_counter()
    session = blockswap.attach(model, device=device, offload="1TB")
    setup_s = time.perf_counter() - begin
    peak = sampler.stop()
    gc.collect()
    after = resident_bytes()
    report = session.report()
    begin = time.perf_counter()
    session.detach()
    return {
        "model": kind,
        "warm": bool(warm_gib),
        "setup_s": setup_s,
        "detach_s": time.perf_counter() - begin,
        "weight_bytes": weight_bytes,
        "host_before_bytes": before,
        "host_after_bytes": after,
        "host_peak_bytes": peak,
        # What is not weights (Python, libraries, the context) is the same before and after.
        "after_over_weights": (after - (before - weight_bytes)) / weight_bytes,
        "peak_over_weights": (peak - (before - weight_bytes)) / weight_bytes,
        "pinned_bytes": report.pinned_bytes,
        "threads": torch.get_num_threads(),
    }


def in_child(kind: str, size: str, warm_gib: int, queue: Any) -> None:
    """Measure in a process of its own."""
    queue.put(measure(kind, size, warm_gib))


def main() -> None:
    """Run cold, then warm."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="flux")
    parser.add_argument("--size", default="full", choices=["full", "tiny"])
    parser.add_argument("--warm-gib", type=int, default=60)
    parser.add_argument("--skip-cold", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    rows = []
    spawn = multiprocessing.get_context("spawn")
    for warm_gib in [options.warm_gib] if options.skip_cold else [0, options.warm_gib]:
        queue = spawn.Queue()
        child = spawn.Process(target=in_child, args=(options.model, options.size, warm_gib, queue))
        child.start()
        row = queue.get(timeout=300)
        child.join()
        rows.append(row)
        print(json.dumps(row), flush=True)
    options.out.write_text(
        json.dumps(make_head(command_line(sys.argv)) | {"rows": rows}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
