"""The benchmark of bounded host memory: what it reads, what it computes, and that it runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.host_memory import PinWatch, copy_speed, locked_bytes, staged_ms
from blockswap import _C
from blockswap.bench import zoo

GB = 10**9
STATUS = "Name:\tpython\nVmLck:\t      {} kB\nVmPin:\t      {} kB\nThreads:\t3\n"


@pytest.mark.parametrize(("lck", "pin", "expected"), [(4, 0, 4096), (4, 9, 9216), (0, 0, 0)])
def test_the_larger_of_locked_and_pinned_memory_counts(lck: int, pin: int, expected: int) -> None:
    assert locked_bytes(STATUS.format(lck, pin)) == expected


def test_a_system_that_counts_no_locked_memory_says_nothing() -> None:
    assert locked_bytes("Name:\tpython\n") == 0


def test_pageable_bytes_pass_at_the_slower_of_link_and_copy() -> None:
    assert staged_ms(5 * GB, 15 * GB, 50.0, 20.0) == pytest.approx(100 + 750)
    assert staged_ms(5 * GB, 15 * GB, 50.0, 80.0) == pytest.approx(100 + 300)


def test_all_pinners_are_watched_from_the_moment_they_are_made() -> None:
    watch, original = PinWatch(), _C.Pinner
    with watch.running():
        pinner = _C.Pinner(_C.make_device("cpu", 0), 2**22)
        arena = _C.HostArena(2**20)
        arena.pin(pinner)
        pinned = pinner.pinned_bytes
    assert _C.Pinner is original
    assert watch.peak_bytes == pinned and watch.samples > 0


def test_the_speed_of_copies_is_that_of_weights() -> None:
    assert 0.01 < copy_speed(zoo.build("flux", "tiny")) < 1000


def test_it_runs_at_toy_size(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    command = [sys.executable, "-m", "benchmarks.host_memory", "--size", "tiny", "--steps", "2"]
    subprocess.run([*command, "--out", str(out)], check=True, capture_output=True)
    (row,) = json.loads(out.read_text())["rows"]
    assert row["status"] == "ok" and row["bit_identical"] and row["holds"]
    assert row["streamed_bytes"] > 0 and row["samples"] > 10
    assert row["pinned_weight_bytes"] + row["pageable_bytes"] == row["peak_host_bytes"]
