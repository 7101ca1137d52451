"""What a busy link costs the host: `python -m benchmarks.contention --out FILE`.

Three kinds of host work, each timed in turns with an idle link and while copies fill it: Python in
the cache, Python over more memory than the cache holds, and launches of a tiny kernel. Only what
crosses the link itself, the launches, should be slower; no engine that streams can be spared that.
Once more while a thread issues the copies meanwhile: what an engine gains that has one.

Then what issuing one copy takes the host, by its size and by who has pinned the memory.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import command_line
from benchmarks.turns import COPY_BYTES, SOURCE_BYTES
from blockswap.bench.core import Core
from blockswap.bench.head import make_head
from blockswap.home import Home

TURNS = 12
COPIES_IN_A_ROW = 8
ISSUED_BYTES = tuple(size * 2**20 for size in (1, 4, 16, 64))


class BusyLink:
    """Copies from pinned memory to the GPU, back to back, on a stream of their own."""

    def __init__(self) -> None:
        self._source = torch.empty(SOURCE_BYTES, dtype=torch.uint8).pin_memory()
        self._target = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda")
        self._stream = torch.cuda.Stream(priority=-1)

    def fill(self, rounds: int = 2) -> None:
        """Enqueue copies for some 40 ms a round."""
        with torch.cuda.stream(self._stream):
            for _ in range(rounds):
                for source in self._source.split(COPY_BYTES):
                    self._target.copy_(source, non_blocking=True)


def make_works() -> dict[str, Callable[[], None]]:
    """Return the kinds of work by name; each takes the host 5 to 30 ms."""
    objects = [{str(number): number for number in range(50)} for _ in range(20_000)]
    small = torch.ones(32, device="cuda")

    def in_cache() -> None:
        for _ in range(300_000):
            pass

    def over_memory() -> None:
        for _ in range(5):
            for one in objects:
                one["7"]

    def launches() -> None:
        for _ in range(3000):
            small.add_(1)

    return {"Python in cache": in_cache, "Python over 100 MB": over_memory, "launches": launches}


def measure(work: Callable[[], None], link: BusyLink) -> dict[str, list[float]]:
    """Return ms of each turn: idle, behind copies that were issued, beside a thread that does."""
    core = Core()
    times: dict[str, list[float]] = {"idle_ms": [], "busy_ms": [], "issuing_ms": []}
    for _ in range(TURNS):
        core.choose()
        work()
        for name, taken in times.items():
            torch.cuda.synchronize()
            if name == "busy_ms":
                link.fill()
            other = threading.Thread(target=link.fill)
            begin = time.perf_counter()
            if name == "issuing_ms":
                other.start()
            work()
            taken.append(1e3 * (time.perf_counter() - begin))
            if other.ident is not None:
                other.join()
    torch.cuda.synchronize()
    core.free()
    return times


def issue_us(source: torch.Tensor, num_bytes: int) -> float:
    """Return microseconds of host time for issuing one copy of so many bytes to an idle link."""
    target = torch.empty(num_bytes, dtype=torch.uint8, device="cuda")
    stream = torch.cuda.Stream(priority=-1)
    times = []
    for _ in range(TURNS):
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            for part in source[: COPIES_IN_A_ROW * num_bytes].split(num_bytes):
                begin = time.perf_counter()
                target.copy_(part, non_blocking=True)
                times.append(1e6 * (time.perf_counter() - begin))
    torch.cuda.synchronize()
    return statistics.median(times)


def measure_issuing() -> list[dict[str, Any]]:
    """Return a row per size of copy and owner of the memory."""
    num_bytes = COPIES_IN_A_ROW * max(ISSUED_BYTES)
    by_torch = torch.zeros(num_bytes, dtype=torch.uint8).pin_memory()
    ours = torch.zeros(num_bytes, dtype=torch.uint8)
    home = Home([ours], torch.device("cuda", torch.cuda.current_device()))
    rows = []
    for owner, source in {"PyTorch": by_torch, "blockswap": ours}.items():
        for size in ISSUED_BYTES:
            us = issue_us(source, size)
            what = f"issuing {size >> 20} MiB pinned by {owner}"
            rows.append({"what": what, "bytes": size, "us": us})
            print(f"{what}: {us:.1f} us")
    home.unpin()
    return rows


def main() -> None:
    """Measure all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks.contention needs a GPU: it measures the link to it")
    link = BusyLink()
    rows: list[dict[str, Any]] = []
    for name, work in make_works().items():
        times = measure(work, link)
        slowdowns = {
            kind: statistics.median(b / a for a, b in zip(times["idle_ms"], taken, strict=True))
            for kind, taken in times.items()
        }
        busy, issuing = slowdowns["busy_ms"], slowdowns["issuing_ms"]
        rows.append({"what": name, "slowdown": busy, "slowdown_issuing": issuing, **times})
        print(
            f"{name}: {statistics.median(times['idle_ms']):.2f} ms, busy link x {busy:.3f},"
            f" beside a thread that issues the copies x {issuing:.3f}"
        )
    rows += measure_issuing()
    head = make_head(command_line(sys.argv))
    options.out.write_text(json.dumps(head | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
