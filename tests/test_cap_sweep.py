"""The sweep of caps: where it runs, and what its rows claim."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.caps import NUM_CAPS, Ends, about_cap
from blockswap.room import MOST_CAP_MARGIN_BYTES

GB = 10**9
MIB = 2**20


def test_caps_run_from_the_smallest_ring_to_everything_resident_and_the_last_is_the_smallest():
    ends = Ends(base=600 * MIB, largest=100 * MIB, everything=20_000 * MIB)
    *even, smallest = ends.caps()
    assert len(even) == NUM_CAPS
    assert even[0] == 750 * MIB + MOST_CAP_MARGIN_BYTES
    assert even[-1] == 20_000 * MIB + MOST_CAP_MARGIN_BYTES
    widths = [b - a for a, b in itertools.pairwise(even)]
    assert max(widths) - min(widths) <= 1
    assert smallest == 700 * MIB + MOST_CAP_MARGIN_BYTES < even[0]


def row(cap: int, peak: int, step_ms: float) -> dict[str, object]:
    return {
        "status": "ok",
        "cap_bytes": cap,
        "peak_device_bytes": peak,
        "link_gb_per_s": 40.0,
        "resident_ms": 100.0,
        "resident_peak_device_bytes": 20 * GB,
        "step_ms": step_ms,
    }


@pytest.mark.parametrize(("peak", "holds"), [(10 * GB, True), (10 * GB + 1, False)])
def test_a_row_holds_only_if_the_peak_stayed_below_the_cap(peak: int, holds: bool) -> None:
    about = about_cap(row(10 * GB, peak, 250.0), 50.0)
    assert about["holds"] is holds
    assert about["frontier_of_cap_ms"] == 200.0  # 10 GB at the best 50 GB/s
    assert about["efficiency_of_cap"] == 0.8


def test_where_little_streams_the_frontier_is_the_resident_step():
    assert about_cap(row(19 * GB, 19 * GB, 125.0), 50.0)["efficiency_of_cap"] == 0.8


def test_a_refused_row_claims_nothing():
    assert about_cap({"status": "CapError: no"}, 50.0) == {}


def test_calls_that_decode_are_the_same_under_a_session(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    command = [sys.executable, "-m", "benchmarks.decode", "--size", "tiny", "--steps", "3"]
    subprocess.run([*command, "--out", str(out)], check=True, capture_output=True)
    resident, streamed = json.loads(out.read_text())["rows"]
    assert resident["engine"] == "resident"
    assert (streamed["status"], streamed["bit_identical"]) == ("ok", True)
    assert streamed["streamed_bytes"] > 0
