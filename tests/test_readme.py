"""The README's figures come from committed results, and its first screen shows what matters."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import tables

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("page", tables.PAGES)
def test_the_table_is_the_one_that_the_script_draws(page: str) -> None:
    text = (ROOT / page).read_text()
    results = tables.newest_results(ROOT / "benchmarks" / "results")
    assert text == tables.rewrite(text, tables.make_table(results))


def test_the_page_of_engines_is_the_one_that_the_script_draws() -> None:
    text = (ROOT / tables.ENGINES_PAGE).read_text()
    benches = tables.newest_results(ROOT / "benchmarks" / "results", "bench")
    assert text == tables.rewrite(text, tables.make_engines_table(benches), tables.ENGINES)
    assert (ROOT / tables.CHART).exists()


def test_the_page_of_caps_is_drawn_from_the_newest_sweeps() -> None:
    text = (ROOT / tables.CAPS_PAGE).read_text()
    sweeps = tables.newest_results(ROOT / "benchmarks" / "results", "cap-sweep")
    assert text == tables.rewrite(text, tables.make_caps_table(sweeps), tables.CAPS)


def test_the_page_of_pipelines_shows_the_newest_row_of_each_pipeline_and_allocator() -> None:
    text = (ROOT / tables.PIPELINES_PAGE).read_text()
    files = tables.newest_results(ROOT / "benchmarks" / "results", "pipelines")
    drawn = tables.make_pipelines_table(files)
    assert text == tables.rewrite(text, drawn, tables.PIPELINES)
    for name in tables.PIPELINE_NAMES.values():
        assert len(re.findall(rf"^\| {re.escape(name)} \|", drawn, re.MULTILINE)) == 1, name


def test_of_each_cap_the_newest_row_is_shown_a_part_behind_the_whole() -> None:
    def sweep(date: str, numbers: str, **rows: float) -> dict[str, Any]:
        made = [
            {"model": "flux", "engine": "blockswap", "number": int(key[1:]), "step_ms": ms}
            for key, ms in rows.items()
        ]
        return {"date": date, "command": f"sweep --numbers {numbers} --steps 2", "rows": made}

    sweeps = [
        ("old-0", sweep("2026-01-01", "0", n0=1.0)),
        ("again-1", sweep("2026-02-02", "1", n1=4.0)),
        ("whole", sweep("2026-02-02", "''", n0=2.0, n1=3.0)),
    ]
    chosen = tables.chosen_caps(sweeps)
    assert {key: (name, row["step_ms"]) for key, (name, row) in chosen.items()} == {
        ("flux", 0): ("whole", 2.0),
        ("flux", 1): ("again-1", 4.0),
    }


def test_every_committed_row_is_bit_identical() -> None:
    for name, result in tables.newest_results(ROOT / "benchmarks" / "results"):
        for row in result["rows"]:
            assert row["status"] == "ok", (name, row)
            assert row["bit_identical"] is True, (name, row)
            if row["cap_bytes"] is not None:
                assert row["peak_allocated_bytes"] <= row["cap_bytes"], (name, row)


def test_no_result_names_a_folder_of_one_machine() -> None:
    heads = [json.loads(p.read_text()) for p in (ROOT / "benchmarks" / "results").glob("*.json")]
    assert heads
    assert not [word for head in heads for word in head.get("command", "").split() if "/" in word]


def test_code_and_table_stand_in_the_first_screen() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert any(line.startswith("```python") for line in lines[:10])
    assert any(line.startswith(tables.BEGIN) for line in lines[:20])


def test_every_committed_pipeline_drew_the_same_under_its_cap() -> None:
    for name, result in tables.newest_results(ROOT / "benchmarks" / "results", "pipelines"):
        for row in result["rows"]:
            assert row["status"] == "ok" and row["bit_identical"] is True, (name, row)
            assert row["peak_device_bytes"] <= row["cap_bytes"], (name, row)
