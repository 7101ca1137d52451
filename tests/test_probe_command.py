"""The command `blockswap probe` and its files: what it writes, refuses and leaves behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fake_meter import PINNED, FakeMeter
from matplotlib.colors import to_rgb
from PIL import Image
from typer.testing import CliRunner, Result

from blockswap import probe_meter, probe_picture
from blockswap.cli import app
from blockswap.probe import CHUNK_BYTES, Link, Probe, SecondsPerCopy, measure, save
from blockswap.probe_meter import TorchMeter

ROOT = Path(__file__).resolve().parent.parent
KIB, MIB = 2**10, 2**20


@pytest.fixture
def meter(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeMeter]:
    """What the command measures with."""
    fake = FakeMeter(speeds={"pinned -> cuda:0": PINNED})
    monkeypatch.setattr(probe_meter, "TorchMeter", lambda device: fake)
    return fake


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["probe", *map(str, arguments)])


def test_json_holds_all_that_was_measured(meter: FakeMeter, tmp_path: Path) -> None:
    assert run("--out", tmp_path / "p.json").exit_code == 0
    written = json.loads((tmp_path / "p.json").read_text())
    assert written["schema_version"] == 1
    assert len(written["date"]) == len("2026-01-31")
    assert [device["name"] for device in written["devices"]] == ["Slow CPU", "Fast Card"]
    assert written["rows"][7]["link"]["host_memory"] == "pinned"
    assert written["rows"][7]["chunk_bytes"] == 64 * KIB
    assert written["rows"][7]["gb_per_s"] == pytest.approx(17.8)
    read = Probe.model_validate(written)
    assert read.rows == measure(meter).rows


def colors_in(picture: Path) -> set[tuple[int, int, int]]:
    return set(map(tuple, np.asarray(Image.open(picture).convert("RGB")).reshape(-1, 3).tolist()))


def rgb(link: Link) -> tuple[int, ...]:
    return tuple(round(255 * part) for part in to_rgb(probe_picture._color(link)))


def test_picture_has_a_line_for_each_kind_of_link(meter: FakeMeter, tmp_path: Path) -> None:
    meter.gpus = ["cuda:0", "cuda:1"]
    result = run("--picture", tmp_path / "p.png")
    assert result.exit_code == 0, result.output
    drawn = colors_in(tmp_path / "p.png")
    colors = {rgb(link) for link in meter.links()}
    assert len(colors) == 5
    assert colors <= drawn


def test_picture_leaves_out_what_was_not_measured(meter: FakeMeter, tmp_path: Path) -> None:
    meter.room = {"pageable -> cuda:0": 0, "cuda:0 -> pageable": 0, "cuda:0 memory": MIB}
    assert run("--picture", tmp_path / "p.png").exit_code == 0
    drawn = colors_in(tmp_path / "p.png")
    assert rgb(Link(source="host", target="cuda:0", host_memory="pageable")) not in drawn
    assert rgb(Link(source="cuda:0", target="cuda:0")) in drawn


@pytest.mark.filterwarnings("error")
def test_picture_of_nothing_is_still_drawn(meter: FakeMeter, tmp_path: Path) -> None:
    meter.room = {link.label: 0 for link in meter.links()}
    assert run("--picture", tmp_path / "p.svg").exit_code == 0
    assert "<svg" in (tmp_path / "p.svg").read_text()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--device", "abacus"], "abacus"),
        (["--device", "cuda:99"], "cuda:99"),
        (["--device", "meta"], "meta"),
        (["--out", "p.txt"], "must end in .json"),
        (["--picture", "p.jpg"], "must end in .png or .svg or .pdf"),
        (["--out", "missing/p.json"], "folder missing does not exist"),
        (["--out", "folder.json"], "is a folder"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], part: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.json").mkdir()
    monkeypatch.setattr(TorchMeter, "open", lambda *_: pytest.fail("it measured"))
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert len(result.stderr.strip().splitlines()) == 1
    assert part in result.stderr
    assert result.stdout == ""


def test_an_interrupt_while_measuring_leaves_files_as_they_were(
    meter: FakeMeter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "p.json").write_text("from last week")

    def interrupt(link: Link, span_bytes: int) -> SecondsPerCopy:
        raise KeyboardInterrupt

    monkeypatch.setattr(meter, "open", interrupt)
    result = run("--out", tmp_path / "p.json", "--picture", tmp_path / "p.png")
    assert result.exit_code == 130, result.output
    assert "interrupted: nothing was written" in result.stderr
    assert (tmp_path / "p.json").read_text() == "from last week"
    assert [path.name for path in tmp_path.iterdir()] == ["p.json"]


def test_an_interrupt_while_drawing_leaves_neither_picture_nor_json(
    meter: FakeMeter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted_draw(probe: Probe, path: Path) -> None:
        path.write_bytes(b"half a picture")
        raise KeyboardInterrupt

    monkeypatch.setattr(probe_picture, "draw", interrupted_draw)
    result = run("--out", tmp_path / "p.json", "--picture", tmp_path / "p.png")
    assert result.exit_code == 130, result.output
    assert list(tmp_path.iterdir()) == []


def test_files_replace_those_of_an_earlier_run(tmp_path: Path) -> None:
    for speed in (10.0, 20.0):
        probe = measure(FakeMeter(num_gpus=0, speeds={"host memory": speed}))
        save(probe, tmp_path / "p.json", tmp_path / "p.png")
    assert Probe.model_validate_json((tmp_path / "p.json").read_text()).rows == probe.rows
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.json", "p.png"]


def start(*arguments: object, stderr: int = subprocess.PIPE) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "blockswap", "probe", "--device", "cpu", *map(str, arguments)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=stderr, text=True,
        env=os.environ | {"TERM": "xterm"},
        # A shell's background job ignores the signal, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def test_probe_runs_from_the_shell_without_colours_in_a_pipe(tmp_path: Path) -> None:
    process = start("--out", tmp_path / "p.json")
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert stderr == ""
    assert "\x1b" not in stdout
    assert "Host memory moves" in stdout
    probe = Probe.model_validate_json((tmp_path / "p.json").read_text())
    assert [row.gb_per_s is not None for row in probe.rows] == [True] * len(CHUNK_BYTES)


def test_control_c_ends_the_command_with_130_and_leaves_nothing(tmp_path: Path) -> None:
    terminal, stderr = os.openpty()
    process = start("--out", tmp_path / "p.json", stderr=stderr)
    os.close(stderr)
    shown = b""
    while b"measuring links" not in shown:
        shown += os.read(terminal, 4096)
    process.send_signal(signal.SIGINT)
    stdout, _ = process.communicate(timeout=120)
    shown += os.read(terminal, 65536)
    os.close(terminal)
    assert process.returncode == 130, shown
    assert b"interrupted: nothing was written" in shown
    assert b"Traceback" not in shown
    assert stdout == ""
    assert list(tmp_path.iterdir()) == []
