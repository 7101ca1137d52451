"""`blockswap probe`: what it measures, what it says of the figures, what it writes."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from PIL import Image
from typer.testing import CliRunner, Result

from blockswap import probe_meter, probe_picture
from blockswap.cli import app
from blockswap.probe import (
    CHUNK_BYTES,
    Device,
    Link,
    Probe,
    Row,
    SecondsPerCopy,
    list_links,
    measure,
    save,
)
from blockswap.probe_meter import TorchMeter, read_slot
from blockswap.probe_text import as_text, large_enough_bytes, sentences

ROOT = Path(__file__).resolve().parent.parent
KIB, MIB = 2**10, 2**20
PINNED = [17.8, 36.0, 48.5, 53.6, 55.0, 55.4, 55.3]
TO_GPU = Link(source="host", target="cuda:0", host_memory="pinned")
HOST_MEMORY = Link(source="host", target="host")


class FakeMeter:
    """A machine of known speeds: by label of the link, one GB/s per size or one for all.

    `room` is how many bytes can be had at each end of the links that it names.
    """

    torch_version = "2.99"

    def __init__(
        self,
        num_gpus: int = 1,
        speeds: Mapping[str, float | Sequence[float]] | None = None,
        room: Mapping[str, int] | None = None,
        access: Mapping[tuple[str, str], bool | None] | None = None,
        chosen: str = "auto",
    ) -> None:
        self.gpus = [f"cuda:{index}" for index in range(num_gpus)]
        self.speeds = speeds or {}
        self.room = room or {}
        self.access = access or {}
        self.chosen = chosen
        self.opened: list[tuple[str, int]] = []

    def devices(self) -> list[Device]:
        gpus = [Device(id=gpu, name="Fast Card") for gpu in self.gpus]
        return [Device(id="host", name="Slow CPU"), *gpus]

    def links(self) -> list[Link]:
        return list_links(self.gpus, self.chosen, lambda a, b: self.access.get((a, b), True))

    def open(self, link: Link, span_bytes: int) -> SecondsPerCopy:
        self.opened.append((link.label, span_bytes))
        if span_bytes > self.room.get(link.label, 2**40):
            raise MemoryError(f"{span_bytes // MIB} MiB could not be had")
        speed = self.speeds.get(link.label, 10.0)

        def seconds_per_copy(chunk_bytes: int) -> float:
            is_list = isinstance(speed, Sequence)
            gb_per_s = speed[CHUNK_BYTES.index(chunk_bytes)] if is_list else speed
            return chunk_bytes * (2 if link.is_memory else 1) / gb_per_s / 1e9

        return seconds_per_copy


def speeds_of(probe: Probe, label: str) -> list[float | None]:
    return [row.gb_per_s for row in probe.rows if row.link.label == label]


def rows_of(*speeds: float | None, link: Link = TO_GPU) -> list[Row]:
    sizes = zip(CHUNK_BYTES, speeds, strict=False)
    return [Row(link=link, chunk_bytes=size, gb_per_s=speed) for size, speed in sizes]


# --- what is measured ----------------------------------------------------------------------------


def test_every_link_of_the_machine_is_measured_at_every_size() -> None:
    probe = measure(FakeMeter(num_gpus=2))
    assert [link.label for link in probe.by_link()] == [
        "host memory",
        *("pinned -> cuda:0", "cuda:0 -> pinned", "pageable -> cuda:0", "cuda:0 -> pageable"),
        "cuda:0 memory",
        *("pinned -> cuda:1", "cuda:1 -> pinned", "pageable -> cuda:1", "cuda:1 -> pageable"),
        "cuda:1 memory",
        *("cuda:0 -> cuda:1", "cuda:1 -> cuda:0"),
    ]
    for rows in probe.by_link().values():
        assert [row.chunk_bytes for row in rows] == list(CHUNK_BYTES)
    assert (CHUNK_BYTES[0], CHUNK_BYTES[-1]) == (64 * KIB, 256 * MIB)


def test_one_device_is_measured_with_its_peers_alone() -> None:
    links = measure(FakeMeter(num_gpus=3, chosen="cuda:1")).by_link()
    assert all("cuda:1" in (link.source, link.target) for link in links)
    assert sum(link.is_peer for link in links) == 4


def test_speed_is_bytes_over_seconds_and_memory_counts_reads_and_writes() -> None:
    probe = measure(FakeMeter(speeds={"pinned -> cuda:0": PINNED, "cuda:0 memory": 4000.0}))
    assert speeds_of(probe, "pinned -> cuda:0") == pytest.approx(PINNED)
    assert speeds_of(probe, "cuda:0 memory") == pytest.approx([4000.0] * 7)


def test_memory_is_taken_once_and_serves_all_sizes() -> None:
    meter = FakeMeter()
    measure(meter)
    assert len(meter.opened) == len(meter.links())


def test_sizes_whose_memory_cannot_be_had_are_rows_with_the_reason() -> None:
    probe = measure(FakeMeter(room={"pinned -> cuda:0": 20 * MIB}))
    rows = probe.by_link()[TO_GPU]
    assert [row.gb_per_s is not None for row in rows] == [True] * 5 + [False] * 2
    assert [row.problem for row in rows[5:]] == [
        "64 MiB could not be had",
        "256 MiB could not be had",
    ]
    assert (
        "pinned -> cuda:0 was not measured at 64 MiB, 256 MiB: 64 MiB could not be had."
        in sentences(probe)
    )
    assert all(row.gb_per_s for row in probe.rows if row.link != TO_GPU)


def test_progress_shows_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", Terminal())
    measure(FakeMeter(num_gpus=0))
    assert "measuring links" in sys.stderr.getvalue()
    assert "7/7" in sys.stderr.getvalue()


# --- what is said --------------------------------------------------------------------------------


def test_large_enough_is_the_size_from_which_all_reach_ninety_percent() -> None:
    assert large_enough_bytes(rows_of(*PINNED)) == 4 * MIB
    assert large_enough_bytes(rows_of(10, 10, 10, 10, 10, 10, 10)) == 64 * KIB
    assert large_enough_bytes(rows_of(55, 10, 48.5, 53.6, 55, 55, 55)) == 4 * MIB  # after the dip
    assert large_enough_bytes(rows_of(17, 36, 48, 53, 55, None, None)) == 4 * MIB
    assert large_enough_bytes(rows_of(17, 36, 48, 53, 55, 55, 20)) is None
    assert large_enough_bytes(rows_of(None, None)) is None


def test_a_gpu_is_described_in_plain_sentences() -> None:
    speeds = {
        "pinned -> cuda:0": PINNED,
        "cuda:0 -> pinned": 52.0,
        "pageable -> cuda:0": 9.4,
        "cuda:0 memory": 4000.0,
        "host memory": 60.0,
    }
    assert sentences(measure(FakeMeter(speeds=speeds))) == [
        "Host memory moves 60.0 GB/s, reads and writes together.",
        "cuda:0 (Fast Card) takes 55.4 GB/s from pinned memory;"
        " copies of 4 MiB and more reach 90% of that.",
        "From pageable memory cuda:0 is 5.9 times slower: 9.4 GB/s.",
        "Back to pinned memory cuda:0 gives 52.0 GB/s.",
        "Memory of cuda:0 moves 4000.0 GB/s, reads and writes together.",
    ]


def test_slot_and_numa_node_are_named_where_they_are_known() -> None:
    class Placed(FakeMeter):
        def devices(self) -> list[Device]:
            slot = {"pcie_generation": 4, "pcie_width": 8, "numa_node": 0}
            return [super().devices()[0], Device(id="cuda:0", name="Fast Card", **slot)]

    assert "cuda:0 (Fast Card, PCIe 4 x8, NUMA node 0) takes" in " ".join(
        sentences(measure(Placed()))
    )


def test_pageable_memory_that_is_not_slower_is_not_called_slower() -> None:
    speeds = {"pinned -> cuda:0": 50.0, "pageable -> cuda:0": 49.0}
    said = sentences(measure(FakeMeter(speeds=speeds)))
    assert "From pageable memory cuda:0 is as fast: 49.0 GB/s." in said


def test_a_link_that_slows_down_with_size_is_told() -> None:
    said = sentences(measure(FakeMeter(speeds={"pinned -> cuda:0": [*PINNED[:6], 20.0]})))
    assert "55.4 GB/s from pinned memory; larger copies are slower again" in " ".join(said)


def test_memory_speed_is_that_of_the_largest_copies_and_not_of_a_cache() -> None:
    cached = [9000.0, 9000.0, 9000.0, 7000.0, 5000.0, 4100.0, 4000.0]
    said = sentences(measure(FakeMeter(speeds={"cuda:0 memory": cached})))
    assert "Memory of cuda:0 moves 4000.0 GB/s, reads and writes together." in said


@pytest.mark.parametrize(
    ("access", "expected"),
    [
        (True, "GPUs reach each other directly: 380.0 to 395.0 GB/s."),
        (
            False,
            "GPUs have no peer access, so copies pass through host memory: 380.0 to 395.0 GB/s.",
        ),
        (None, "GPUs copy to each other, whether directly is not known: 380.0 to 395.0 GB/s."),
    ],
)
def test_peer_access_is_told_with_the_speeds(access: bool | None, expected: str) -> None:
    speeds = {"cuda:0 -> cuda:1": 395.0, "cuda:1 -> cuda:0": 380.0}
    both = {("cuda:0", "cuda:1"): access, ("cuda:1", "cuda:0"): access}
    assert sentences(measure(FakeMeter(num_gpus=2, speeds=speeds, access=both)))[-1] == expected


def test_pairs_without_peer_access_are_named_beside_those_with_it() -> None:
    access = {("cuda:0", "cuda:1"): False}
    said = sentences(measure(FakeMeter(num_gpus=2, access=access)))[-2:]
    assert said == [
        "GPUs reach each other directly (cuda:1 -> cuda:0): 10.0 GB/s.",
        "GPUs have no peer access, so copies pass through host memory (cuda:0 -> cuda:1):"
        " 10.0 GB/s.",
    ]


def test_a_machine_without_a_gpu_is_told_so() -> None:
    first, second = sentences(measure(FakeMeter(num_gpus=0, speeds={"host memory": 20.0})))
    assert first.startswith("torch sees no GPU here, so only host memory was measured")
    assert second == "Host memory moves 20.0 GB/s, reads and writes together."
    said = sentences(measure(FakeMeter(num_gpus=1, chosen="host")))
    assert not any("no GPU" in sentence for sentence in said)


def test_table_has_a_line_per_link_and_fits_a_narrow_terminal() -> None:
    speeds = {"pinned -> cuda:0": PINNED, "cuda:0 memory": 4000.0}
    table, _, _ = as_text(
        measure(FakeMeter(speeds=speeds, room={"cuda:0 -> pinned": 64 * KIB}))
    ).partition("\n\n")
    lines = table.splitlines()
    assert lines[0].split()[-4:] == ["64", "MiB", "256", "MiB"]
    cells = {line[:20].strip(): line[20:].split() for line in lines[1:]}
    assert cells["pinned -> cuda:0"] == [f"{speed:.1f}" for speed in PINNED]
    assert cells["cuda:0 -> pinned"] == ["10.0", *["-"] * 6]
    assert len(cells) == 6
    assert all(len(line) <= 80 for line in lines)


def test_colours_are_for_terminals_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    probe = measure(FakeMeter())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert "\x1b[" in as_text(probe)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False, raising=False)
    assert "\x1b" not in as_text(probe)


# --- the meter -----------------------------------------------------------------------------------


def test_the_host_alone_is_measured_for_real(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_meter, "NUM_SAMPLES", 1)
    meter = TorchMeter("cpu")
    assert meter.links() == [HOST_MEMORY]
    seconds = meter.open(HOST_MEMORY, 4 * MIB)(MIB)
    assert 0.05 < 2 * MIB / seconds / 1e9 < 2000
    assert meter.devices()[0].id == "host"
    assert meter.devices()[0].name


def test_memory_that_the_machine_does_not_have_raises_memory_error() -> None:
    with pytest.raises(MemoryError, match="of host memory could not be had"):
        TorchMeter("cpu").open(HOST_MEMORY, 2**60)


def test_each_copy_takes_the_chunk_after_the_one_before() -> None:
    source = torch.arange(1, 5, dtype=torch.uint8).repeat_interleave(2)
    target = torch.zeros_like(source)
    copy, num_copies = probe_meter._walk(source, target, 2, is_async=False)
    assert num_copies == 4
    copy(3)
    assert target.tolist() == [1, 1, 2, 2, 3, 3, 0, 0]
    target.zero_()
    copy(2)
    assert target.tolist() == [1, 1, 0, 0, 0, 0, 4, 4]


@pytest.mark.parametrize(
    ("card", "port", "expected"),
    [
        (("32.0 GT/s PCIe", "16", "1"), "32.0 GT/s PCIe", (5, 16, 1)),
        (("16.0 GT/s PCIe", "8", "-1"), "8.0 GT/s PCIe", (3, 8, None)),
        (("Unknown", "0", "0"), None, (None, None, 0)),
        (None, None, (None, None, None)),
    ],
    ids=["known", "slower slot, no NUMA", "virtual", "nothing there"],
)
def test_slot_is_read_where_the_system_shows_it(
    tmp_path: Path,
    card: tuple[str, str, str] | None,
    port: str | None,
    expected: tuple[int | None, int | None, int | None],
) -> None:
    folder = tmp_path / "port" / "card"
    folder.mkdir(parents=True)
    if card is not None:
        for name, text in zip(
            ("max_link_speed", "current_link_width", "numa_node"), card, strict=True
        ):
            (folder / name).write_text(f"{text}\n")
    if port is not None:
        (folder.parent / "max_link_speed").write_text(f"{port}\n")
    link = tmp_path / "0000:01:00.0"
    link.symlink_to(folder)
    assert read_slot(link) == expected


# --- the command and its files -------------------------------------------------------------------


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
