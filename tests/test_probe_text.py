"""What `blockswap probe` says of the figures: sentences and a table."""

from __future__ import annotations

import sys

import pytest
from fake_meter import PINNED, FakeMeter

from blockswap.probe import CHUNK_BYTES, Device, Link, Row, measure
from blockswap.probe_text import as_text, large_enough_bytes, sentences

KIB, MIB = 2**10, 2**20
TO_GPU = Link(source="host", target="cuda:0", host_memory="pinned")


def rows_of(*speeds: float | None, link: Link = TO_GPU) -> list[Row]:
    sizes = zip(CHUNK_BYTES, speeds, strict=False)
    return [Row(link=link, chunk_bytes=size, gb_per_s=speed) for size, speed in sizes]


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
