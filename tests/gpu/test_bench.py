"""The engines of `blockswap bench` that are installed, on a GPU at tiny size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from blockswap.bench.request import BenchRequest
from blockswap.bench.run import run_bench

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("kind", ["flux", "sdxl", "wan", "qwen"])
def test_every_installed_engine_runs_and_leaves_the_process_as_it_was(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("blockswap.bench.core.ROUNDS", 1)  # a fast core is not needed here
    out = tmp_path / "bench.json"
    request = BenchRequest((kind,), "tiny", (), 3, "cuda", out)  # type: ignore[arg-type]
    device = torch.get_default_device()

    comparisons = run_bench(request, lambda *_: None, "blockswap bench")

    rows = json.loads(out.read_text())["rows"]
    assert {"resident", "blockswap", "diffusers-block", "diffusers-leaf"} <= {
        row["engine"] for row in rows
    }
    for row in rows:
        # What others cannot run, or run with another result, is theirs, and the row says it.
        if row["engine"] in ("resident", "blockswap", "diffusers-block", "diffusers-leaf"):
            assert row["status"] == "ok", row
            assert row["bit_identical"], row
    assert comparisons
    assert torch.get_default_device() == device
    assert not torch.overrides._get_current_function_mode_stack()
