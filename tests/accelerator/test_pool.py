"""The caching pool on a device without pages: segments, and streams that really run apart."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from blockswap import _C
from blockswap.errors import DeviceError

MIB = 2**20


def make_pool(limit_bytes: int = 64 * MIB) -> _C.CachingPool:
    device = _C.make_device("fake", 0)
    return _C.CachingPool(device, _C.make_segment_pages(device), limit_bytes, check=True)


def fill(address: int, value: int) -> torch.Tensor:
    return _C.tensor_over(address, 16 * MIB, "fake:0").fill_(value)


def test_another_stream_has_a_block_only_when_its_operator_ran(accelerator: ModuleType) -> None:
    pool, a, b = make_pool(), accelerator.Stream(), accelerator.Stream()
    accelerator.set_body_delay(0.2)
    first = pool.allocate(16 * MIB, a.stream_id)
    with accelerator.stream(a):
        fill(first, 1)
    pool.free(first, a.stream_id)
    assert pool.allocate(16 * MIB, b.stream_id) != first
    assert pool.give_back(2**62) == 0
    assert not a.query(), "the host waited"
    a.synchronize()
    assert pool.allocate(16 * MIB, b.stream_id) == first


def test_at_the_limit_another_stream_writes_after_the_operator(accelerator: ModuleType) -> None:
    pool, a, b = make_pool(16 * MIB), accelerator.Stream(), accelerator.Stream()
    accelerator.set_body_delay(0.2)
    first = pool.allocate(16 * MIB, a.stream_id)
    with accelerator.stream(a):
        fill(first, 1)
    pool.free(first, a.stream_id)
    accelerator.set_body_delay(0.0)
    assert pool.allocate(16 * MIB, b.stream_id) == first
    with accelerator.stream(b):
        tensor = fill(first, 2)
    assert not a.query(), "the host waited"
    accelerator.synchronize()
    assert bool((tensor == 2).all())


def test_segments_come_from_the_device_and_go_back_to_it(accelerator: ModuleType) -> None:
    before = accelerator.memory_allocated()
    pool = make_pool()
    address = pool.allocate(16 * MIB)
    assert accelerator.memory_allocated() - before == 16 * MIB
    pool.free(address)
    given_back = pool.trim()  # perhaps nothing: its stream may still use the block
    accelerator.synchronize()
    assert given_back + pool.trim() == 16 * MIB
    assert accelerator.memory_allocated() == before


def test_memory_that_the_device_lacks_comes_from_the_pools_own_segments(
    accelerator: ModuleType,
) -> None:
    pool = make_pool()
    accelerator.set_limit(accelerator.memory_allocated() + 40 * MIB)
    kept = pool.allocate(12 * MIB)
    pool.free(pool.allocate(16 * MIB))
    assert pool.allocate(24 * MIB) != kept  # fits when the free segment has gone back
    with pytest.raises(DeviceError, match=r"no 16.0 MiB .* fake out of memory"):
        pool.allocate(16 * MIB)
    assert pool.stats().reserved_bytes == 36 * MIB
