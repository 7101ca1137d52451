"""The caching pool from Python, over host memory that plays a device."""

from __future__ import annotations

import gc
import weakref

import pytest
from torch.cuda import _memory_viz

from blockswap import _C
from blockswap.errors import ConfigError, DeviceError, UseError

MIB = 2**20


def make_pool(limit_bytes: int = 64 * MIB) -> _C.CachingPool:
    return _C.CachingPool(
        _C.make_device("cpu", 0), _C.make_host_pages(256 * MIB), limit_bytes, check=True
    )


def test_tensors_over_blocks_read_and_write() -> None:
    pool = make_pool()
    addresses = [pool.allocate(3 * MIB) for _ in range(3)]
    tensors = [_C.tensor_over(address, 3 * MIB, "cpu") for address in addresses]
    assert [tensor.data_ptr() for tensor in tensors] == addresses
    for value, tensor in enumerate(tensors):
        tensor.fill_(value)
    assert [int(tensor.max()) for tensor in tensors] == [0, 1, 2]
    for address in addresses:
        pool.free(address)
    assert pool.stats().allocated_bytes == 0
    assert pool.give_back(2**62) == pool.stats().peak_reserved_bytes


def test_pressure_is_asked_in_python_and_may_free() -> None:
    pool = make_pool(limit_bytes=8 * MIB)
    resident = [pool.allocate(6 * MIB)]
    asked = []

    def shed(num_bytes: int) -> bool:
        asked.append(num_bytes)
        if not resident:
            return False
        pool.free(resident.pop())
        return True

    pool.set_on_pressure(shed)
    kept = pool.allocate(4 * MIB)
    with pytest.raises(DeviceError, match="no 5.0 MiB .* the limit is 8.0 MiB"):
        pool.allocate(5 * MIB)
    pool.free(kept)
    pool.set_on_pressure(None)
    assert asked == [4 * MIB, 5 * MIB]
    assert (pool.stats().num_retries, pool.stats().num_ooms) == (2, 1)


def test_a_callback_that_names_its_pool_dies_with_it() -> None:
    pool = make_pool()
    gone = weakref.ref(pool)
    pool.set_on_pressure(lambda _, mine=pool: mine is None)
    del pool
    gc.collect()
    assert gone() is None


def test_an_error_in_the_callback_is_the_callers_and_the_pool_goes_on() -> None:
    pool = make_pool(limit_bytes=8 * MIB)
    pool.set_on_pressure(lambda _: 1 // 0)
    kept = pool.allocate(8 * MIB)
    with pytest.raises(ZeroDivisionError):
        pool.allocate(MIB)
    pool.free(kept)
    pool.free(pool.allocate(8 * MIB))


def test_torchs_memory_visualiser_reads_the_snapshot() -> None:
    pool = make_pool()
    kept, freed = pool.allocate(1000), pool.allocate(5 * MIB)
    pool.free(freed)
    snapshot = pool.snapshot(device=0)
    stats = pool.stats()
    segments = snapshot["segments"]
    assert sum(segment["total_size"] for segment in segments) == stats.reserved_bytes
    assert sum(segment["allocated_size"] for segment in segments) == 1024
    assert {s["segment_type"] for s in segments} == {"small", "large"}
    assert segments[0]["blocks"][0]["address"] == kept
    assert "<html" in _memory_viz.segment_plot(snapshot).lower()


def test_pages_belong_to_one_pool() -> None:
    pages = _C.make_host_pages(8 * MIB)
    pool = _C.CachingPool(_C.make_device("cpu", 0), pages)
    with pytest.raises(UseError, match="belong to a pool already"):
        _C.CachingPool(_C.make_device("cpu", 0), pages)
    with pytest.raises(UseError, match="is no block of this pool"):
        pool.free(4096)
    with pytest.raises(ConfigError, match="a power of two of at least 4.0 KiB"):
        _C.make_host_pages(8 * MIB, 1000)


def test_segments_serve_a_device_without_pages() -> None:
    device = _C.make_device("cpu", 0)
    pool = _C.CachingPool(device, _C.make_segment_pages(device), check=True)
    address = pool.allocate(3 * MIB)
    _C.tensor_over(address, 3 * MIB, "cpu").fill_(1)
    pool.free(address)
    assert pool.trim() == 20 * MIB
