"""The benchmark of whole pipelines: what it computes, and that it runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.pipelines import Phase, floor_seconds
from blockswap.guests import GuestReport

GB = 10**9


def part(resident: int, streamed: int) -> Any:
    return SimpleNamespace(
        resident_bytes=resident, streamed_bytes=streamed, idle_link_gb_per_s=50.0
    )


def test_the_least_that_a_call_takes_is_compute_or_bytes_of_each_component() -> None:
    report: Any = SimpleNamespace(
        parts={
            "transformer": part(resident=5 * GB, streamed=10 * GB),
            "text_encoder": part(resident=0, streamed=10 * GB),
        },
        guests={"vae": GuestReport(weight_bytes=GB, turns=8, peak_bytes=None)},
    )
    phases = {"transformer": Phase(1.0), "text_encoder": Phase(0.05), "vae": Phase(0.3)}
    # 5 GB once and 10 GB in each of 10 steps; 10 GB once; compute.
    assert floor_seconds(phases, report, {"transformer": 10}) == pytest.approx(2.1 + 0.2 + 0.3)
    phases["transformer"].seconds = 4.0
    assert floor_seconds(phases, report, {"transformer": 10}) == pytest.approx(4.0 + 0.2 + 0.3)


def test_it_runs_at_toy_size(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    command = [sys.executable, "-m", "benchmarks.pipelines", "--models", "flux", "--size", "tiny"]
    subprocess.run([*command, "--device", "cpu", "--out", str(out)], check=True, timeout=250)
    (row,) = json.loads(out.read_text())["rows"]
    assert row["bit_identical"] is True
    assert row["streamed_bytes"]["transformer"] > 0.9 * row["leaf_bytes"]["transformer"]
    assert set(row["phases_s"]) == {"transformer", "text_encoder", "text_encoder_2", "vae"}
    assert all(seconds > 0 for seconds in row["phases_s"].values())
