"""What `blockswap probe` measures, and how."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
import torch
from fake_meter import PINNED, FakeMeter

from blockswap import probe_meter
from blockswap.probe import CHUNK_BYTES, Link, Probe, measure
from blockswap.probe_meter import TorchMeter, read_slot
from blockswap.probe_text import sentences

KIB, MIB = 2**10, 2**20
TO_GPU = Link(source="host", target="cuda:0", host_memory="pinned")
HOST_MEMORY = Link(source="host", target="host")


def speeds_of(probe: Probe, label: str) -> list[float | None]:
    return [row.gb_per_s for row in probe.rows if row.link.label == label]


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
