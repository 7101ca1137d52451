"""The benchmark of the pool under PyTorch: how it balances figures, compares rows, and that it runs."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from benchmarks.accounts import Account, Block, blocks_in_use, bytes_inside, live_blocks
from benchmarks.pluggable import digest
from benchmarks.workers import Worker, compare, run_in_turns
from blockswap import _C
from blockswap.bench.rows import Row

BALANCED = Account(
    allocated=10_000,
    reserved=20_000,
    blocks=10_000,
    num_blocks=3,
    tensors=6_000,
    sessions=3_000,
    driver=30_000,
)


def test_an_account_is_balanced_if_blocks_add_up_to_tensors_and_sessions_rounded_up() -> None:
    assert BALANCED.others == 1_000
    assert BALANCED.is_balanced
    assert replace(BALANCED, tensors=7_000, driver=20_000).is_balanced


@pytest.mark.parametrize(
    "wrong",
    [
        {"blocks": 9_999},
        {"blocks": 10_001},
        {"tensors": 7_001},
        {"tensors": 5_000},
        {"sessions": 2_000},
        {"num_blocks": 1},
        {"reserved": 9_999},
        {"driver": 19_999},
    ],
    ids=str,
)
def test_an_account_with_one_figure_off_is_not_balanced(wrong: dict[str, int]) -> None:
    assert not replace(BALANCED, **wrong).is_balanced


def test_blocks_of_a_pool_that_are_in_use_add_up_to_what_it_has_allocated() -> None:
    pool = _C.CachingPool(_C.make_device("cpu", 0), _C.make_host_pages(2**30))
    kept = [pool.allocate(size) for size in (700, 3_000_000, 40_000)]
    pool.free(pool.allocate(5_000_000))
    blocks = blocks_in_use(pool.snapshot())
    assert [block.address for block in blocks] == sorted(kept)
    assert sum(block.bytes for block in blocks) == pool.stats().allocated_bytes
    for address in kept:
        pool.free(address)


def test_parts_count_that_lie_in_a_block_as_a_whole() -> None:
    blocks = [Block(100, 50), Block(150, 50), Block(1000, 10)]
    assert bytes_inside([Block(100, 50), Block(160, 20), Block(1000, 10)], blocks) == 80
    outside = [Block(90, 5), Block(99, 2), Block(140, 20), Block(300, 1), Block(1005, 6)]
    assert bytes_inside(outside, blocks) == 0
    assert bytes_inside([Block(1, 1)], []) == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there are some there")
def test_tensors_in_host_memory_are_not_live_blocks() -> None:
    kept = torch.zeros(3)
    assert live_blocks() == [] and kept.numel() == 3


def test_a_digest_is_that_of_the_bytes() -> None:
    x = torch.arange(6, dtype=torch.bfloat16).reshape(2, 3)
    assert digest(x) == hashlib.sha256(x.view(torch.int16).numpy().tobytes()).hexdigest()
    assert digest(x.T) == digest(x.T.contiguous()) != digest(x)
    assert digest(torch.tensor([0.0])) != digest(torch.tensor([-0.0]))


def row(allocator: str, spells_ms: list[float], sha256: str) -> Row:
    return {"allocator": allocator, "status": "ok", "spells_ms": spells_ms, "sha256": sha256}


def test_rows_are_set_beside_the_first_by_their_own_quiet_times() -> None:
    failed = {"allocator": "pool", "status": "failed: exit status 1"}
    first = row("torch", [100.0, 104.0, 200.0, 300.0], "a")
    rows = compare([first, row("install", [500.0, 500.0, 102.0, 500.0], "b"), failed])
    assert [one.get("step_ratio") for one in rows] == [1.04, 1.02, None]
    assert [one.get("identical") for one in rows] == [True, False, None]


def test_a_row_that_missed_turns_is_not_compared() -> None:
    rows = compare([row("torch", [100.0] * 4, "a"), row("install", [100.0] * 3, "a")])
    assert "step_ratio" not in rows[1]


def test_without_times_of_the_first_nothing_is_claimed() -> None:
    failed: Row = {"allocator": "torch", "status": "failed: exit status 1"}
    rows = [failed, row("install", [102.0], "b")]
    assert compare(rows) == rows


def times_steps(parent: Connection, log: Path, name: str, dies_at: int) -> None:
    parent.send({"sha256": name})
    for spell in itertools.count():
        if (order := parent.recv()) is None:
            break
        assert order.core is None or order.core in os.sched_getaffinity(0)
        if spell == dies_at:
            os._exit(3)
        with log.open("a") as lines:
            lines.write(name)
        parent.send([10.0 * spell, 30.0 * spell, 20.0 * spell])
    parent.send({"last": name})


def test_workers_time_their_steps_in_turns_and_say_something_last(tmp_path: Path) -> None:
    log = tmp_path / "log"
    workers = [Worker({"name": name}, times_steps, log, name, 9) for name in "ab"]
    run_in_turns(workers, 3)
    first, second = (worker.end() for worker in workers)
    assert second["spells_ms"] == [0.0, 20.0, 40.0]
    assert log.read_text() == "ababab"
    assert first["last"] == "a" and second["last"] == second["name"] == "b"
    assert first["spells_ms"] == [0.0, 20.0, 40.0]
    assert (first["step_ms_min"], first["step_ms"], first["step_ms_max"]) == (0.0, 20.0, 60.0)
    assert first["status"] == "ok"


def test_a_worker_that_dies_is_told_of_and_the_others_go_on(tmp_path: Path) -> None:
    workers = [
        Worker({}, times_steps, tmp_path / "log", name, dies) for name, dies in (("a", 1), ("b", 9))
    ]
    run_in_turns(workers, 3)
    dead, alive = (worker.end() for worker in workers)
    assert dead["status"] == "failed: exit status 3" and dead["spells_ms"] == [0.0]
    assert alive["status"] == "ok" and len(alive["spells_ms"]) == 3


def test_no_turn_begins_when_time_is_up_but_for_the_first(tmp_path: Path) -> None:
    worker = Worker({}, times_steps, tmp_path / "log", "a", 9)
    run_in_turns([worker], 3, within_s=0.0)
    assert worker.end()["spells_ms"] == [0.0]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="installs the pool there")
def test_without_a_gpu_it_streams_on_pytorchs_allocator_and_says_what_it_skips(
    tmp_path: Path,
) -> None:
    out = tmp_path / "rows.json"
    command = [sys.executable, "-m", "benchmarks.pluggable", "--size", "tiny", "--steps", "2"]
    subprocess.run([*command, "--out", str(out)], check=True, capture_output=True)
    plain, *others = json.loads(out.read_text())["rows"]
    assert plain["status"] == "ok" and plain["streamed_bytes"] > 0
    assert len(plain["sha256"]) == 64
    assert [one["status"].partition(":")[0] for one in others] == ["skipped", "skipped"]
