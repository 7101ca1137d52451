"""What PyTorch recorded of its allocator, as rows for the replay."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.allocator import compare
from benchmarks.traces import Trace, num_streams, rows_of
from blockswap import _C


def entry(action: str, addr: int, size: int, stream: int = 0) -> dict[str, Any]:
    return {"action": action, "addr": addr, "size": size, "stream": stream, "time_us": 1}


def alloc(addr: int, size: int, stream: int = 0) -> dict[str, Any]:
    return entry("alloc", addr, size, stream)


def free(addr: int, size: int, stream: int = 0) -> list[dict[str, Any]]:
    return [entry(f"free_{when}", addr, size, stream) for when in ("requested", "completed")]


def held_after(rows: list[tuple[int, int]]) -> dict[int, int]:
    """The replay's rule: a slot is taken when free, and freed when taken."""
    held: dict[int, int] = {}
    for slot, num_bytes in rows:
        assert (slot in held) == (num_bytes == 0)
        if num_bytes:
            held[slot] = num_bytes
        else:
            del held[slot]
    return held


def test_a_block_is_taken_and_freed_once_and_its_slot_used_again() -> None:
    entries = [alloc(0x1000, 700), *free(0x1000, 700), alloc(0x2000, 9), *free(0x2000, 9)]
    assert rows_of(entries) == [(0, 700), (0, 0), (0, 9), (0, 0)]


def test_blocks_that_live_at_once_have_slots_of_their_own() -> None:
    entries = [alloc(1, 10), alloc(2, 20), *free(1, 10), alloc(3, 30), *free(3, 30), *free(2, 20)]
    assert rows_of(entries) == [(0, 10), (1, 20), (0, 0), (0, 30), (0, 0), (1, 0)]


def test_blocks_from_before_the_recording_play_no_part() -> None:
    entries = [*free(0x9000, 512), alloc(0x1000, 5), *free(0x8000, 64), *free(0x1000, 5)]
    assert rows_of(entries) == [(0, 5), (0, 0)]
    assert rows_of(free(0x9000, 512)) == []


def test_what_is_held_at_the_end_is_freed() -> None:
    rows = rows_of([alloc(1, 10), alloc(2, 20)])
    assert rows[:2] == [(0, 10), (1, 20)]
    assert held_after(rows) == {}


def test_an_address_that_comes_again_was_freed_meanwhile() -> None:
    rows = rows_of([alloc(1, 10), alloc(1, 30), *free(1, 30)])
    assert rows == [(0, 10), (0, 0), (0, 30), (0, 0)]


def test_a_free_that_waits_for_another_stream_counts_when_it_was_asked_for() -> None:
    requested, completed = free(1, 10)
    entries = [alloc(1, 10), requested, alloc(2, 20), completed, *free(2, 20)]
    assert rows_of(entries) == [(0, 10), (0, 0), (0, 20), (0, 0)]


def test_blocks_of_two_streams_share_the_trace_and_are_counted() -> None:
    entries = [alloc(1, 10, stream=7), alloc(2, 20, stream=8), *free(1, 10, 7), *free(2, 20, 8)]
    assert rows_of(entries) == [(0, 10), (1, 20), (0, 0), (1, 0)]
    assert num_streams(entries) == 2


def test_other_actions_are_passed_over_also_those_that_name_no_address() -> None:
    others: list[dict[str, Any]] = [
        entry("segment_alloc", 1, 2**21),
        {"action": "oom", "device_free": 5, "size": 7, "stream": 0},
        entry("snapshot", 0, 0),
        entry("of a later PyTorch", 1, 1),
        entry("segment_free", 1, 2**21),
    ]
    assert rows_of([*others, alloc(1, 10), *others, *free(1, 10)]) == [(0, 10), (0, 0)]


def test_recorded_rows_replay_without_overlap_or_leak() -> None:
    entries = [alloc(1, 5_000_000), alloc(2, 300), *free(1, 5_000_000), alloc(1, 4_000_000)]
    trace = torch.tensor(rows_of(entries), dtype=torch.int64)
    pool = _C.CachingPool(_C.make_device("cpu", 0), _C.make_host_pages(2**30))
    _C.replay_on_pool(trace, 3, pool, "cpu", check=True)
    stats = pool.stats()
    assert (stats.allocated_bytes, stats.num_allocations) == (0, 9)


def test_the_scale_is_that_of_sizes() -> None:
    trace = Trace(0.5)
    trace.drop(trace.take(100))
    assert trace.as_tensor().tolist() == [[0, 50], [0, 0]]


def test_ratios_are_ours_over_theirs_and_need_all_rows() -> None:
    ours = {"peak_reserved_bytes": 105, "us_per_operation": 0.4}
    theirs = {"peak_reserved_bytes": 100, "us_per_operation": 0.2}
    assert compare([ours, theirs, {"us_per_operation": 0.5}]) == {
        "reserved_ratio": 1.05,
        "time_ratio": 2.0,
        "installed_time_ratio": 2.5,
    }
    assert compare([ours]) == {}


@pytest.mark.skipif(torch.cuda.is_available(), reason="records there")
def test_without_a_gpu_a_recorded_trace_is_skipped_and_says_so(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    command = [sys.executable, "-m", "benchmarks.allocator", "--trace", "made-up,flux"]
    options = ["--size", "tiny", "--operations", "1000", "--steps", "1", "--scale", "0.01"]
    subprocess.run([*command, *options, "--out", str(out)], check=True, capture_output=True)
    made_up, flux = json.loads(out.read_text())["rows"]
    assert made_up["trace"] == "made-up" and made_up["leaked_bytes"] == 0
    assert flux["trace"] == "flux" and flux["status"].startswith("skipped")
