"""PyTorch on the caching pool while a model streams: `python -m benchmarks.pluggable --help`.

The same model in three processes, half of its leaves streamed: on PyTorch's allocator, with the
pool as the allocator of the process, and with steps in a MemPool of the pool's. They take turns, so
that a host whose pace drifts slows all alike. Compared are the time of a step and every byte of the
output, and the pool's figures are balanced. Under `install()` a forward then needs more than
residents leave, and must run again without them.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import nn

import blockswap
from benchmarks import command_line
from benchmarks.accounts import Account, blocks_in_use, bytes_inside, live_blocks
from benchmarks.workers import Worker, compare, run_in_turns
from blockswap import memory
from blockswap.bench import zoo
from blockswap.bench.core import on_core
from blockswap.bench.head import make_head
from blockswap.bench.rows import MAX_LEARNING_STEPS, WARM_STEPS, Row
from blockswap.bench.timing import timed_steps
from blockswap.blocks import find_blocks

PLAIN, INSTALLED, POOLED = "torch", "install", "pool"
ALLOCATORS = (PLAIN, INSTALLED, POOLED)
GIB = 2**30
TURNS = 60
TURNS_WITHIN_S = 75.0
# The cap of the burst: half of the leaves, and so much for activations.
ACTIVATION_BYTES = 2 * GIB


def digest(output: torch.Tensor) -> str:
    """Return a hash of a tensor's bytes."""
    raw = output.detach().contiguous().reshape(-1).view(torch.uint8).cpu()
    return hashlib.sha256(raw.numpy().tobytes()).hexdigest()


def can_take(num_bytes: int) -> bool:
    """Whether PyTorch gets so much memory now."""
    try:
        torch.empty(num_bytes, dtype=torch.uint8, device="cuda")
    except torch.OutOfMemoryError:
        return False
    return True


class Child:
    """One process: a model in host memory and its inputs on the device, under one allocator.

    Args:
        allocator: of `ALLOCATORS`.
        kind: which model.
        size: "full" or "tiny".
    """

    def __init__(self, allocator: str, kind: str, size: str) -> None:
        self._on_gpu = torch.cuda.is_available()
        if allocator == INSTALLED:
            memory.install()  # before anything is on the GPU
        self._free_before = torch.cuda.mem_get_info()[0] if self._on_gpu else 0
        self._allocator = allocator
        device = "cuda" if self._on_gpu else "cpu"
        dtype = torch.bfloat16 if self._on_gpu else torch.float32
        draw_on = device if size == "full" else "cpu"
        self._model: nn.Module = zoo.build(kind, size, dtype, "cpu", 0, draw_on=draw_on)  # type: ignore[arg-type]
        self._inputs = zoo.make_inputs(kind, self._model, device, dtype, 1)  # type: ignore[arg-type]
        self._pool = memory.pool() if allocator == POOLED else None

    @contextlib.contextmanager
    def streamed(self) -> Iterator[Row]:
        """Stream half meanwhile; gives the row of that, without times."""
        offload = f"{blockswap.leaf_bytes(self._model) // 2}B"
        with blockswap.attach(self._model, offload=offload) as session:
            self._learn(session)
            self._output = self._step(**self._inputs)[0]
            row: Row = {
                "allocator": self._allocator,
                "streamed_bytes": session.report().streamed_bytes,
                "sha256": digest(self._output),
            }
            yield row | ({} if self._allocator == PLAIN else self._balance(session))

    def spell(self, steps: int, core: int | None) -> list[float]:
        """Return ms of so many steps on that core."""
        with on_core(core):
            times, output = timed_steps(self._step, self._inputs, steps + 1)  # type: ignore[arg-type]
        if not torch.equal(output, self._output):
            raise blockswap.BlockswapError("a step changed the output")
        return times[1:]

    def _step(self, **inputs: Any) -> Any:
        """Run one step; a MemPool is open for no longer, since PyTorch frees no cache meanwhile."""
        inside: AbstractContextManager[None] = contextlib.nullcontext()
        if self._pool is not None:
            inside = torch.cuda.use_mem_pool(self._pool)
        with inside:
            return self._model(**inputs)

    def _learn(self, session: blockswap.Session) -> None:
        for _ in range(MAX_LEARNING_STEPS):
            self._step(**self._inputs)
            if session.state == "ready":
                break
        for _ in range(WARM_STEPS):
            self._step(**self._inputs)

    def _balance(self, session: blockswap.Session) -> Row:
        """Return the pool's figures beside what tensors and the driver say."""
        torch.cuda.synchronize()
        torch._C._cuda_clearCublasWorkspaces()  # no tensor holds them
        figures, blocks = memory.stats(), blocks_in_use(memory.snapshot())
        is_installed = self._allocator == INSTALLED
        # Elsewhere, PyTorch's own account of the segments that it took.
        segments = [] if self._pool is None else self._pool.snapshot()
        segment_bytes = sum(segment["total_size"] for segment in segments)
        account = Account(
            allocated=figures["allocated_bytes"],
            reserved=figures["reserved_bytes"],
            blocks=sum(block.bytes for block in blocks),
            num_blocks=len(blocks),
            tensors=bytes_inside(live_blocks(), blocks) if is_installed else segment_bytes,
            sessions=session.report().pool_bytes,
            driver=self._free_before - torch.cuda.mem_get_info()[0],
        )
        row: Row = {"account": asdict(account) | {"others": account.others}}
        row["balanced"] = account.is_balanced
        return row

    def burst(self) -> Row:
        """Return what became of a forward that needed what residents hold.

        The process may map no more than a small card has; the session keeps to the same cap with
        its residents, which lie outside the pool.
        """
        card = blockswap.leaf_bytes(self._model) // 2 + ACTIVATION_BYTES
        memory.trim()
        memory.set_limit(None, card)
        bursts: list[int] = []  # bytes
        blocks = find_blocks(self._model)

        def take_for_a_while(*_: Any) -> None:
            for num_bytes in bursts:
                torch.empty(num_bytes, dtype=torch.uint8, device="cuda")

        handle = blocks[len(blocks) // 2].module.register_forward_pre_hook(take_for_a_while)
        with blockswap.attach(self._model, vram=card) as session:
            self._learn(session)
            before = session.report()
            # More than PyTorch's share of the cap by a quarter of what residents and ring take.
            bursts.append(card - 3 * before.pool_bytes // 4)
            output = self._step(**self._inputs)[0]
            bursts.clear()
            after = session.report()
            limit_is_back = can_take(3 * card // 4) and not can_take(card + GIB)
        handle.remove()
        memory.set_limit(None, None)
        return {
            "card_bytes": card,
            "resident_bytes": before.resident_bytes,
            "burst_bytes": card - 3 * before.pool_bytes // 4,
            "ooms_before": before.ooms,
            "ooms": after.ooms,
            "ladder": after.ladder,
            "peak_device_bytes": after.peak_device_bytes,
            "bit_identical": torch.equal(output, self._output),
            "limit_is_back": limit_is_back,
            "shed": after.ladder == {"shed": 1} and before.ooms == 0,
        }


def work(parent: Connection, allocator: str, options: argparse.Namespace) -> None:
    """Stream in this process, as a `Worker` does; the burst comes last."""
    with torch.no_grad():
        child = Child(allocator, options.model, options.size)
        with child.streamed() as row:
            parent.send(row)
            while order := parent.recv():
                parent.send(child.spell(options.steps, order.core))
        parent.send({"burst": child.burst()} if allocator == INSTALLED else {})


def main() -> None:
    """Measure one model in three processes."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--model", default="flux", choices=zoo.KINDS)
    parser.add_argument("--size", default="full", choices=["full", "tiny"])
    parser.add_argument("--steps", type=int, default=3, help="in each turn")
    parser.add_argument("--turns", type=int, default=TURNS)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    given = ALLOCATORS if torch.cuda.is_available() else (PLAIN,)
    rows: list[Row] = []
    # One after the other: while a child starts, the others hold what they hold, and the driver's
    # figures are about the new one.
    workers = [Worker({"allocator": each}, work, each, options) for each in given]
    run_in_turns(workers, options.turns, TURNS_WITHIN_S)
    for row in compare([worker.end() for worker in workers]):
        rows.append({"model": options.model} | row)
        print(json.dumps(rows[-1]), flush=True)
    rows += [
        {"allocator": allocator, "status": "skipped: the pool serves PyTorch on a GPU"}
        for allocator in ALLOCATORS[len(given) :]
    ]
    head = make_head(command_line(sys.argv))
    options.out.write_text(json.dumps(head | {"rows": rows}, indent=1) + "\n")
    sys.exit(any(row["status"].startswith("failed") for row in rows))


if __name__ == "__main__":
    main()
