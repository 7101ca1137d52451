"""`blockswap probe` on the fake accelerator: events on real streams, links of known speed."""

from __future__ import annotations

from types import ModuleType

import pytest

from blockswap import probe, probe_meter
from blockswap.probe import Link, measure
from blockswap.probe_meter import TorchMeter
from blockswap.probe_text import best_gb_per_s

MIB = 2**20


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "CHUNK_BYTES", (2**18, MIB, 4 * MIB))
    monkeypatch.setattr(probe_meter, "NUM_SAMPLES", 3)
    monkeypatch.setattr(probe_meter, "WARM_UP_SECONDS", 0.0)


def test_speed_of_every_link_is_that_of_its_copies(accelerator: ModuleType) -> None:
    accelerator.set_copy_delay(seconds_per_byte=1e-9)  # 1 GB/s, and the copy itself
    for link, rows in measure(TorchMeter("fake:0")).by_link().items():
        best = best_gb_per_s(rows)
        assert best is not None
        assert 0.5 < best / (2 if link.is_memory else 1) < 1.0, (link.label, rows)


def test_speed_of_small_copies_shows_what_each_copy_costs(accelerator: ModuleType) -> None:
    accelerator.set_copy_delay(seconds_per_byte=0.0, seconds_per_copy=2e-3)
    rows = measure(TorchMeter("fake:1")).by_link()[
        Link(source="host", target="fake:1", host_memory="pinned")
    ]
    assert rows[0].gb_per_s == pytest.approx(2**18 / 2e-3 / 1e9, rel=0.3)


def test_device_memory_that_cannot_be_had_is_a_row(accelerator: ModuleType) -> None:
    accelerator.set_limit(accelerator.memory_allocated() + 3 * MIB)
    rows = measure(TorchMeter("fake:0")).by_link()[
        Link(source="host", target="fake:0", host_memory="pinned")
    ]
    assert [row.gb_per_s is None for row in rows] == [False, False, True]
    assert rows[2].problem == "4 MiB of memory of fake:0 could not be had"
