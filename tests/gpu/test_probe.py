"""`blockswap probe` on a real link. `pytest -m gpu`; with two GPUs also `-m multi_gpu`."""

from __future__ import annotations

import pytest
import torch

from blockswap.probe import Link, measure
from blockswap.probe_meter import TorchMeter
from blockswap.probe_text import sentences

CHUNK_BYTES = 64 * 2**20


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "least_gb_per_s"), [("pinned", 5.0), ("pageable", 0.0)])
def test_host_feeds_the_gpu_at_a_plausible_speed(kind: str, least_gb_per_s: float) -> None:
    link = Link.model_validate({"source": "host", "target": "cuda:0", "host_memory": kind})
    seconds = TorchMeter("cuda").open(link, CHUNK_BYTES)(CHUNK_BYTES)
    assert least_gb_per_s < CHUNK_BYTES / seconds / 1e9 < 2000


@pytest.mark.gpu
def test_every_link_of_a_gpu_is_measured_and_described() -> None:
    found = measure(TorchMeter("cuda:0"))
    assert all(row.gb_per_s for row in found.rows), [row for row in found.rows if row.problem]
    said = " ".join(sentences(found))
    assert torch.cuda.get_device_name(0) in said
    assert "GB/s from pinned memory" in said


@pytest.mark.multi_gpu
def test_peers_are_measured_in_both_directions() -> None:
    links = {(link.source, link.target): link for link in TorchMeter().links() if link.is_peer}
    for ends in (("cuda:0", "cuda:1"), ("cuda:1", "cuda:0")):
        seconds = TorchMeter().open(links[ends], CHUNK_BYTES)(CHUNK_BYTES)
        assert links[ends].peer_access == torch.cuda.can_device_access_peer(
            *map(torch.device, ends)
        )
        assert CHUNK_BYTES / seconds / 1e9 > 0.5
