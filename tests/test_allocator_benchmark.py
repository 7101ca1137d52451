"""The allocator's benchmark at toy size, on host memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import allocator, traces


def test_benchmark_replays_without_overlap_or_leak(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "allocator.json"
    options = f"--operations 20000 --steps 4 --scale 0.1 --out {out}"
    monkeypatch.setattr("sys.argv", ["allocator.py", *options.split()])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    allocator.main()
    result = json.loads(out.read_text())
    ours = result["rows"][0]
    assert ours["allocator"] == "blockswap"
    assert ours["operations"] >= 10_000
    assert ours["leaked_bytes"] == 0
    assert ours["given_back_bytes"] == ours["peak_reserved_bytes"]
    assert ours["live_peak_bytes"] <= ours["peak_reserved_bytes"] <= 2 * ours["live_peak_bytes"]


def test_a_trace_frees_all_that_it_takes() -> None:
    held: set[int] = set()
    for slot, num_bytes in traces.make_trace(num_steps=2).tolist():
        assert (slot in held) == (num_bytes == 0)
        held ^= {slot}
    assert not held
