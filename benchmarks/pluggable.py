"""PyTorch on the caching pool while a model streams: `python -m benchmarks.pluggable --help`.

The same model in three processes, half of its leaves streamed: on PyTorch's allocator, with the
pool as the allocator of the process, and with steps in a MemPool of the pool's. Compared are the
time of a step and every byte of the output, and the pool's figures are balanced. Under `install()`
a forward then needs more than residents leave, and must run again without them.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import statistics
import subprocess
import sys
import tempfile
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

import blockswap
from benchmarks import command_line
from benchmarks.accounts import Account, blocks_in_use, bytes_inside, live_blocks
from blockswap import memory
from blockswap.bench import zoo
from blockswap.bench.core import Core
from blockswap.bench.head import make_head
from blockswap.bench.rows import MAX_LEARNING_STEPS, WARM_STEPS, Row
from blockswap.bench.timing import timed_steps
from blockswap.blocks import find_blocks

PLAIN, INSTALLED, POOLED = "torch", "install", "pool"
ALLOCATORS = (PLAIN, INSTALLED, POOLED)
GIB = 2**30
SPELLS = 6
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

    def run(self, steps: int) -> Row:
        """Return the row of a session that streams half."""
        offload = f"{blockswap.leaf_bytes(self._model) // 2}B"
        with blockswap.attach(self._model, offload=offload) as session:
            self._learn(session)
            times, output = self._time(steps)
            row: Row = {
                "allocator": self._allocator,
                "step_ms": statistics.median(times),
                "step_ms_min": min(times),
                "step_ms_max": max(times),
                "streamed_bytes": session.report().streamed_bytes,
                "sha256": digest(output),
            }
            if self._allocator != PLAIN:
                row |= self._balance(session)
        if self._allocator == INSTALLED:
            try:
                row["burst"] = self._burst(output)
            except (blockswap.BlockswapError, torch.OutOfMemoryError) as error:
                row["burst"] = {"status": f"{type(error).__name__}: {error}"}
        return row

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

    def _time(self, steps: int) -> tuple[list[float], Any]:
        """Return ms of the steps of the quietest spell, each on the fastest core, and the output.

        Three processes cannot take turns, and a host's pace drifts.
        """
        core, spells = Core(), []
        for _ in range(SPELLS):
            core.choose()
            times, output = timed_steps(self._step, self._inputs, steps)  # type: ignore[arg-type]
            spells.append(times[1:])
        core.free()
        return min(spells, key=statistics.median), output

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

    def _burst(self, expected: torch.Tensor) -> Row:
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
            "bit_identical": torch.equal(output, expected),
            "limit_is_back": limit_is_back,
            "shed": after.ladder == {"shed": 1} and before.ooms == 0,
        }


def compare(rows: list[Row]) -> list[Row]:
    """Return the rows with each one's time and output beside those on PyTorch's allocator."""
    plain = next((row for row in rows if row["allocator"] == PLAIN), None)
    if plain is None or "step_ms" not in plain:
        return rows
    return [
        row
        | {
            "step_ratio": row["step_ms"] / plain["step_ms"],
            "identical": row["sha256"] == plain["sha256"],
        }
        if "step_ms" in row
        else row
        for row in rows
    ]


def run_child(allocator: str, options: argparse.Namespace) -> Row:
    """Return the row of a process of its own, or how it failed."""
    if allocator != PLAIN and not torch.cuda.is_available():
        return {"allocator": allocator, "status": "skipped: the pool serves PyTorch on a GPU"}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "row.json"
        command = [sys.executable, "-m", "benchmarks.pluggable", "--child", allocator]
        given = [f"--{name}={getattr(options, name)}" for name in ("model", "size", "steps")]
        done = subprocess.run([*command, *given, f"--out={out}"], check=False)
        status = f"failed: exit status {done.returncode}" if done.returncode else "ok"
        row: Row = json.loads(out.read_text()) if out.exists() else {}  # it may fail at its end
    return {"allocator": allocator, "status": status} | row


def main() -> None:
    """Measure one model in three processes, or be one of them."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--model", default="flux", choices=zoo.KINDS)
    parser.add_argument("--size", default="full", choices=["full", "tiny"])
    parser.add_argument("--steps", type=int, default=6, help="in each spell")
    parser.add_argument("--child", choices=ALLOCATORS, help="run that one in this process")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if options.child:
        with torch.no_grad():
            row = Child(options.child, options.model, options.size).run(options.steps)
        options.out.write_text(json.dumps(row, default=str))
        return
    rows: list[Row] = []
    failed = False
    for allocator in ALLOCATORS:
        rows.append({"model": options.model} | run_child(allocator, options))
        failed = failed or rows[-1]["status"].startswith("failed")
        print(json.dumps(compare(rows)[-1]), flush=True)
    head = make_head(command_line(sys.argv))
    options.out.write_text(json.dumps(head | {"rows": compare(rows)}, indent=1) + "\n")
    sys.exit(failed)


if __name__ == "__main__":
    main()
