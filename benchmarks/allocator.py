"""The caching pool beside PyTorch's allocator: `python -m benchmarks.allocator --out FILE`.

Replays what denoising steps of a transformer allocate and free, in C++, on both. Ours is replayed
a second time with a ledger of all blocks, which refuses overlaps. On a machine without a GPU the
pool's pages are host memory, and there is no allocator of PyTorch's to compare with.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import command_line
from blockswap import _C
from blockswap.bench.head import make_head

SHAPES = ((4096, 3072), (4608, 3072), (1536, 3072), (8192, 1536), (2304, 5120))  # tokens, width
NUM_BLOCKS = 24
TOTAL_BYTES_ON_HOST = 64 * 2**30  # addresses: pages that are never touched cost nothing


class Trace:
    """Rows (slot, bytes) of allocations and, with 0 bytes, frees; all is freed at its end."""

    def __init__(self, scale: float) -> None:
        self.rows: list[tuple[int, int]] = []
        self._scale = scale
        self._free_slots: list[int] = []
        self._num_slots = 0

    def take(self, num_bytes: float) -> int:
        """Allocate; return the slot."""
        if not self._free_slots:
            self._free_slots.append(self._num_slots)
            self._num_slots += 1
        slot = self._free_slots.pop()
        self.rows.append((slot, max(1, int(num_bytes * self._scale))))
        return slot

    def drop(self, *slots: int) -> None:
        """Free."""
        for slot in slots:
            self.rows.append((slot, 0))
            self._free_slots.append(slot)


def run_block(trace: Trace, tokens: int, width: int, draw: random.Random) -> None:
    """Allocate what one transformer block in bfloat16 does: modulation, attention, MLP."""
    row = 2.0 * width
    modulation = [trace.take(row) for _ in range(6)]
    statistics = trace.take(8.0 * tokens)
    normed = trace.take(tokens * row)
    heads = [trace.take(tokens * row) for _ in range(3)]
    trace.drop(normed, statistics)
    rotated = [trace.take(tokens * row) for _ in range(2)]
    trace.drop(*heads[:2])
    workspace = trace.take(draw.choice((2**20, 4 * 2**20, 32 * 2**20)))
    attended = trace.take(tokens * row)
    trace.drop(*rotated, heads[2], workspace)
    projected = trace.take(tokens * row)
    trace.drop(attended)
    hidden = trace.take(4 * tokens * row)
    activated = trace.take(4 * tokens * row)
    trace.drop(hidden)
    out = trace.take(tokens * row)
    trace.drop(activated, projected, out, *modulation)


def make_trace(num_steps: int, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    """Return the rows of steps whose shapes change from one to the next."""
    draw = random.Random(seed)
    trace = Trace(scale)
    for _ in range(num_steps):
        tokens, width = draw.choice(SHAPES)
        stream = trace.take(2.0 * tokens * width)
        embeddings = [trace.take(draw.randrange(1000, 400_000)) for _ in range(12)]
        for _ in range(NUM_BLOCKS):
            run_block(trace, tokens, width, draw)
        trace.drop(stream, *embeddings)
    return torch.tensor(trace.rows, dtype=torch.int64)


def live_peak_bytes(trace: torch.Tensor) -> int:
    """Return the most bytes that the trace holds at once: no allocator can reserve less."""
    held: dict[int, int] = {}
    now = peak = 0
    for slot, num_bytes in trace.tolist():
        now += num_bytes or -held[slot]
        held[slot] = num_bytes
        peak = max(peak, now)
    return peak


def make_pool(device: str) -> _C.CachingPool:
    """Return a pool on the GPU's own pages or, without a GPU, on host memory."""
    if device == "cuda":
        pages = _C.make_gpu_pages(0) or _C.make_segment_pages(_C.make_device("cuda", 0))
    else:
        pages = _C.make_host_pages(TOTAL_BYTES_ON_HOST)
    return _C.CachingPool(_C.make_device(device, 0), pages)


def measure(device: str, trace: torch.Tensor, repeats: int) -> Iterator[dict[str, Any]]:
    """Yield a row per allocator."""
    name = "cuda:0" if device == "cuda" else device
    num_operations = repeats * len(trace)
    common = {"operations": num_operations, "live_peak_bytes": live_peak_bytes(trace)}
    pool = make_pool(device)
    _C.replay_on_pool(trace, 1, pool, name)  # maps the pages
    seconds = _C.replay_on_pool(trace, repeats, pool, name)
    _C.replay_on_pool(trace, repeats, pool, name, check=True)
    stats = pool.stats()
    if device == "cuda":
        torch.cuda.synchronize()
    yield {
        "allocator": "blockswap",
        **common,
        "us_per_operation": 1e6 * seconds / num_operations,
        "peak_reserved_bytes": stats.peak_reserved_bytes,
        "leaked_bytes": stats.allocated_bytes + stats.pending_bytes,
        "given_back_bytes": pool.trim(),
        "num_maps": stats.num_maps,
    }
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_reserved()
        _C.replay_on_torch(trace, 1, name)
        seconds = _C.replay_on_torch(trace, repeats, name)
        yield {
            "allocator": "torch",
            **common,
            "us_per_operation": 1e6 * seconds / num_operations,
            "peak_reserved_bytes": torch.cuda.max_memory_reserved() - before,
        }


def main() -> None:
    """Measure both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--operations", type=int, default=10_000_000)
    parser.add_argument("--steps", type=int, default=60, help="distinct steps in the trace")
    parser.add_argument("--scale", type=float, default=1.0, help="of all sizes")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    trace = make_trace(options.steps, options.scale)
    rows = []
    for row in measure(device, trace, max(1, options.operations // len(trace))):
        rows.append(row)
        print(json.dumps(row), flush=True)
    options.out.write_text(
        json.dumps(make_head(command_line(sys.argv)) | {"rows": rows}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
