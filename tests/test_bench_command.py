"""The command `blockswap bench`: what it draws, when it fails, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bench_rows import RESIDENT, SMALLEST, row
from typer.testing import CliRunner

from blockswap.cli import app


def test_the_command_draws_a_table_and_a_picture_from_a_file(tmp_path: Path) -> None:
    out, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    rows = [RESIDENT, SMALLEST, row("diffusers-leaf", 0.61, 484.0, use_stream=True)]
    out.write_text(json.dumps({"rows": rows}))
    done = CliRunner().invoke(
        app, ["bench", "--draw", "--out", str(out), "--picture", str(picture)]
    )
    assert done.exit_code == 0, done.output
    assert "diffusers-leaf" in done.output
    assert "1.03" in done.output
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_command_fails_where_another_engine_is_faster(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    out.write_text(json.dumps({"rows": [RESIDENT, SMALLEST, row("diffusers-leaf", 0.61, 400.0)]}))
    done = CliRunner().invoke(app, ["bench", "--draw", "--out", str(out)])
    assert done.exit_code == 1
    assert "SLOWER" in done.output


def test_the_command_fails_where_our_output_differs_or_ours_did_not_run(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    other = row("diffusers-leaf", 0.61, 484.0)
    for ours in (SMALLEST | {"bit_identical": False}, SMALLEST | {"status": "refused: no"}):
        out.write_text(json.dumps({"rows": [RESIDENT, ours, other]}))
        assert CliRunner().invoke(app, ["bench", "--draw", "--out", str(out)]).exit_code == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--draw", "--out", "missing.json"], "missing.json holds no results"),
        (["--out", "bench.txt"], "must end in .json"),
        (["--out", "no/such/folder/bench.json"], "does not exist"),
        (["--picture", "bench.bmp"], "must end in .png"),
        (["--model", "sd1", "--device", "cpu"], "unknown model sd1"),
    ],
)
def test_the_command_refuses_bad_input_in_one_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["bench", *arguments])
    assert done.exit_code == 2
    assert message in done.output
    assert len(done.output.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
