"""The caching pool over a GPU's own pages: real kernels, real unmapping."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from blockswap import _C
from blockswap.errors import DeviceError

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).resolve().parent.parent.parent
MIB = 2**20
HALF_A_SECOND = 10**9  # cycles


def make_pool(limit_bytes: int = 2**62) -> _C.CachingPool:
    pages = _C.make_gpu_pages(torch.cuda.current_device())
    assert pages is not None, "this driver cannot map pages"
    device = _C.make_device("cuda", torch.cuda.current_device())
    return _C.CachingPool(device, pages, limit_bytes, check=True)


def bytes_at(address: int, num_bytes: int) -> torch.Tensor:
    return _C.tensor_over(address, num_bytes, f"cuda:{torch.cuda.current_device()}")


def keep_busy(stream: torch.cuda.Stream) -> None:
    with torch.cuda.stream(stream):
        torch.cuda._sleep(HALF_A_SECOND)


def warm_up(*streams: torch.cuda.Stream) -> None:
    """Load the kernels that a test uses: the first launch of one may wait for the device."""
    for stream in streams:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(1)
            torch.ones(4, dtype=torch.uint8, device="cuda").fill_(2)
    torch.cuda.synchronize()


def test_kernels_write_through_tensors_over_blocks() -> None:
    pool = make_pool()
    sizes = [1000, MIB, 3 * MIB, 40 * MIB]
    addresses = [pool.allocate(size) for size in sizes]
    for value, (address, size) in enumerate(zip(addresses, sizes, strict=True)):
        bytes_at(address, size).fill_(value + 1)
    for value, (address, size) in enumerate(zip(addresses, sizes, strict=True)):
        assert bool((bytes_at(address, size) == value + 1).all())
        pool.free(address)
    torch.cuda.synchronize()
    assert pool.give_back(2**62) == pool.stats().peak_reserved_bytes


def test_give_back_lowers_used_memory_while_a_kernel_runs() -> None:
    pool, other = make_pool(), torch.cuda.Stream()
    warm_up(other)
    address = pool.allocate(256 * MIB)
    bytes_at(address, 256 * MIB).fill_(1)
    pool.free(address)
    torch.cuda.synchronize()
    keep_busy(other)
    free_before = torch.cuda.mem_get_info()[0]
    given = pool.give_back(2**62)
    free_after = torch.cuda.mem_get_info()[0]
    assert not other.query(), "giving back waited for a kernel"
    assert given == 256 * MIB
    assert free_after - free_before >= 0.9 * given
    torch.cuda.synchronize()


def test_addresses_survive_unmapping_and_mapping() -> None:
    pool = make_pool()
    first = pool.allocate(64 * MIB)
    bytes_at(first, 64 * MIB).fill_(1)
    pool.free(first)
    torch.cuda.synchronize()
    assert pool.give_back(2**62) == 64 * MIB
    assert pool.allocate(64 * MIB) == first
    tensor = bytes_at(first, 64 * MIB).fill_(2)
    assert bool((tensor == 2).all())


def test_nothing_waits_for_the_device_in_steady_state() -> None:
    pool, a, b = make_pool(), torch.cuda.Stream(), torch.cuda.Stream()
    warm_up(a, b)
    keep_busy(a)
    first = pool.allocate(64 * MIB, a.cuda_stream)
    pool.free(first, a.cuda_stream)
    assert pool.allocate(64 * MIB, a.cuda_stream) == first
    pool.free(first, a.cuda_stream)
    assert pool.allocate(64 * MIB, b.cuda_stream) != first
    assert pool.give_back(2**62) == 0, "A's kernel may still use the free block"
    assert not a.query(), "the host waited for A"
    a.synchronize()
    assert pool.give_back(2**62) == 64 * MIB


def test_the_limit_holds_and_nothing_leaks() -> None:
    before = torch.cuda.mem_get_info()[0]
    pool = make_pool(limit_bytes=128 * MIB)
    address = pool.allocate(100 * MIB)
    with pytest.raises(DeviceError, match="no 64.0 MiB .* the limit is 128.0 MiB"):
        pool.allocate(64 * MIB)
    assert pool.stats().reserved_bytes <= 128 * MIB
    pool.free(address)
    del pool
    assert before - torch.cuda.mem_get_info()[0] <= 32 * MIB


def test_at_the_limit_a_stream_writes_after_the_one_whose_memory_it_takes() -> None:
    pool, a, b = make_pool(limit_bytes=64 * MIB), torch.cuda.Stream(), torch.cuda.Stream()
    warm_up(a, b)
    first = pool.allocate(64 * MIB, a.cuda_stream)
    keep_busy(a)
    with torch.cuda.stream(a):
        bytes_at(first, 64 * MIB).fill_(1)
    pool.free(first, a.cuda_stream)
    second = pool.allocate(64 * MIB, b.cuda_stream)
    assert second == first
    assert not a.query(), "the host waited for A"
    with torch.cuda.stream(b):
        tensor = bytes_at(second, 64 * MIB).fill_(2)
    torch.cuda.synchronize()
    assert bool((tensor == 2).all())


def test_two_streams_at_random_never_see_each_others_bytes() -> None:
    pool, draw = make_pool(limit_bytes=256 * MIB), random.Random(0)
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    wrong = [torch.zeros((), dtype=torch.int64, device="cuda") for _ in streams]
    held: list[tuple[int, int, int, int]] = []
    torch.cuda.synchronize()
    for step in range(2000):
        if held and (len(held) > 24 or draw.random() < 0.5):
            address, size, which, value = held.pop(draw.randrange(len(held)))
            with torch.cuda.stream(streams[which]):
                wrong[which] += (bytes_at(address, size) != value).sum()
            pool.free(address, streams[which].cuda_stream)
        else:
            which, size = draw.randrange(2), draw.randrange(1, 8 * MIB)
            address = pool.allocate(size, streams[which].cuda_stream)
            with torch.cuda.stream(streams[which]):
                bytes_at(address, size).fill_(step % 251)
            held.append((address, size, which, step % 251))
    torch.cuda.synchronize()
    assert [int(count) for count in wrong] == [0, 0]


# The driver promises nothing about a destroyed stream, not even to survive the question.
WITH_A_DESTROYED_STREAM = """
import ctypes
import torch
from tests.gpu.test_pool import MIB, bytes_at, make_pool
pool, made = make_pool(limit_bytes=64 * MIB), ctypes.c_void_p()
assert int(torch.cuda.cudart().cudaStreamCreate(ctypes.addressof(made))) == 0
stream = made.value
first = pool.allocate(64 * MIB, stream)
with torch.cuda.stream(torch.cuda.ExternalStream(stream)):
    bytes_at(first, 64 * MIB).fill_(1)
assert int(torch.cuda.cudart().cudaStreamDestroy(stream)) == 0
pool.free(first, stream)
assert pool.allocate(64 * MIB) == first
assert bool((bytes_at(first, 64 * MIB).fill_(2) == 2).all())
"""


def test_a_destroyed_stream_takes_no_memory_with_it() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITH_A_DESTROYED_STREAM],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_more_than_the_gpu_has_is_refused_before_anything_is_mapped() -> None:
    pool = make_pool()
    pool.free(pool.allocate(64 * MIB))
    total = torch.cuda.mem_get_info()[1]
    with pytest.raises(DeviceError, match="the device has .* in all"):
        pool.allocate(total + 1)
    assert pool.stats().num_maps == 1
    assert pool.stats().reserved_bytes == 64 * MIB
