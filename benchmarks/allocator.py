"""The caching pool beside PyTorch's allocator: `python -m benchmarks.allocator --out FILE`.

Replays what denoising steps allocate and free, in C++, on both: steps of a transformer that are
made up, or forwards of a model that PyTorch recorded. Ours is replayed a second time with a ledger
of all blocks, which refuses overlaps, and once more in a process of its own where PyTorch asks it
for all memory. On a machine without a GPU the pool's pages are host memory,
there is no allocator of PyTorch's to compare with, and none to record.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import command_line, write_rows
from benchmarks.traces import make_trace, num_streams, record_forwards, rows_of
from blockswap import _C, memory
from blockswap.bench import zoo
from blockswap.bench.head import make_head

MADE_UP = "made-up"
TRACES = (MADE_UP, *zoo.KINDS)
TOTAL_BYTES_ON_HOST = 64 * 2**30  # addresses: pages that are never touched cost nothing


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


def replay_installed(trace: torch.Tensor, repeats: int, device: str) -> float:
    """Return the seconds of a trace where the pool is PyTorch's allocator."""
    memory.install()
    torch.cuda.init()
    _C.replay_on_torch(trace, 1, device)
    return float(_C.replay_on_torch(trace, repeats, device))


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
            "reserved_before_bytes": before,
        }
        torch.cuda.empty_cache()
        spawn = multiprocessing.get_context("spawn")  # a fork would share this process's CUDA
        with spawn.Pool(1) as processes:
            seconds = processes.apply(replay_installed, (trace, repeats, name))
        yield {
            "allocator": "install",
            **common,
            "us_per_operation": 1e6 * seconds / num_operations,
        }


def compare(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what ours takes of PyTorch's memory and time, by itself and through PyTorch."""
    if len(rows) < 3:
        return {}
    ours, theirs, installed = rows
    return {
        "reserved_ratio": ours["peak_reserved_bytes"] / theirs["peak_reserved_bytes"],
        "time_ratio": ours["us_per_operation"] / theirs["us_per_operation"],
        "installed_time_ratio": installed["us_per_operation"] / theirs["us_per_operation"],
    }


def measure_trace(name: str, device: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the rows of one trace, ours first."""
    about: dict[str, Any] = {"trace": name}
    if name == MADE_UP:
        trace = make_trace(options.steps, options.scale)
    elif device == "cuda":
        entries = record_forwards(name, options.size, options.forwards)
        about |= {"forwards": options.forwards, "num_streams": num_streams(entries)}
        trace = torch.tensor(rows_of(entries), dtype=torch.int64)
    else:
        return [about | {"status": "skipped: only the allocator of a GPU records what it does"}]
    rows = list(measure(device, trace, max(1, options.operations // len(trace))))
    rows[0] |= compare(rows)
    return [about | row for row in rows]


def main() -> None:
    """Measure both."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--trace", default=MADE_UP, help=f"of {', '.join(TRACES)}, with commas")
    parser.add_argument("--size", default="full", choices=["full", "tiny"], help="if recorded")
    parser.add_argument("--forwards", type=int, default=4, help="to record")
    parser.add_argument("--operations", type=int, default=10_000_000)
    parser.add_argument("--steps", type=int, default=60, help="distinct steps, if made up")
    parser.add_argument("--scale", type=float, default=1.0, help="of all sizes, if made up")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    names = options.trace.split(",")
    if unknown := sorted(set(names) - set(TRACES)):
        parser.error(f"--trace {', '.join(unknown)}: give some of {', '.join(TRACES)}")
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def rows() -> Iterator[dict[str, Any]]:
        for name in names:
            for row in measure_trace(name, device, options):
                print(json.dumps(row), flush=True)
                yield row

    write_rows(rows(), make_head(command_line(sys.argv)), options.out)


if __name__ == "__main__":
    main()
