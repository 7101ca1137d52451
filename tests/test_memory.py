"""What PyTorch's allocator does with the pool, over host memory that plays a GPU's."""

from __future__ import annotations

import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from blockswap import _C, _build_info, memory
from blockswap.device_memory import DeviceMemory
from blockswap.errors import ConfigError, DeviceError, UseError

MIB = 2**20
DEVICE = 7

without_gpu = pytest.mark.skipif(
    _build_info.BUILD != "cpu", reason="a build with GPU has other refusals"
)


@pytest.fixture
def pool() -> Iterator[_C.CachingPool]:
    """The pool of a device that no machine has."""
    made = _C.CachingPool(_C.make_device("cpu", 0), _C.make_host_pages(64 * MIB), check=True)
    _C.set_pluggable_pool(DEVICE, made)
    yield made
    _C.set_pluggable_pool(DEVICE, None)


# The process' allocator --------------------------------------------------------------------------


def test_tensors_take_their_memory_from_the_devices_pool(pool: _C.CachingPool) -> None:
    block = _C.torch_alloc(3 * MIB, DEVICE, 0)
    _C.tensor_over(block, 3 * MIB, "cpu").fill_(1)
    assert memory.stats(DEVICE)["allocated_bytes"] == 3 * MIB
    _C.torch_free(block, 3 * MIB, DEVICE, 0)
    assert memory.stats(DEVICE)["allocated_bytes"] == 0
    assert _C.torch_alloc(0, DEVICE, 0) == 0


def test_no_memory_is_pytorchs_error_with_the_pools_numbers(pool: _C.CachingPool) -> None:
    memory.set_limit(DEVICE, 32 * MIB)
    text = "no 33.0 MiB in one block: .* 0 B are in use, the limit is 32.0 MiB.*: free some of it"
    with pytest.raises(torch.OutOfMemoryError, match=text) as error:
        _C.torch_alloc(33 * MIB, DEVICE, 0)
    assert error.type is torch.cuda.OutOfMemoryError
    assert memory.stats(DEVICE)["num_ooms"] == 1


def test_a_recorded_stream_keeps_the_memory(pool: _C.CachingPool) -> None:
    block = _C.torch_alloc(3 * MIB, DEVICE, 0)
    _C.torch_record_stream(block, 1)
    _C.torch_record_stream(torch.zeros(4).data_ptr(), 1)  # of no pool: nothing happens
    _C.torch_free(block, 3 * MIB, DEVICE, 0)
    assert memory.stats(DEVICE)["pending_bytes"] == 3 * MIB


def test_what_cannot_be_freed_is_a_warning(pool: _C.CachingPool) -> None:
    with pytest.warns(UserWarning, match="could not free a tensor's memory: .* is no block"):
        _C.torch_free(4096, MIB, DEVICE, 0)


def test_graphs_are_refused_in_a_sentence() -> None:
    with pytest.raises(RuntimeError, match="do not work under blockswap.memory.install"):
        _C.torch_refuse_graphs()


def test_a_fraction_of_the_device_becomes_the_limit(pool: _C.CachingPool) -> None:
    _C.torch_set_memory_fraction(0.25, DEVICE)
    with pytest.raises(torch.OutOfMemoryError, match=re.escape("the limit is 16.0 MiB")):
        _C.torch_alloc(17 * MIB, DEVICE, 0)


def test_emptying_the_cache_gives_back_what_is_unused(pool: _C.CachingPool) -> None:
    _C.torch_free(_C.torch_alloc(8 * MIB, DEVICE, 0), 8 * MIB, DEVICE, 0)
    assert memory.stats(DEVICE)["reserved_bytes"] == 8 * MIB
    _C.torch_empty_cache()
    assert memory.stats(DEVICE)["reserved_bytes"] == 0


# A MemPool ---------------------------------------------------------------------------------------


def test_a_mem_pool_hears_of_no_memory_by_a_null_address(pool: _C.CachingPool) -> None:
    segment = _C.mem_pool_alloc(20 * MIB, DEVICE, 0)
    assert memory.stats(DEVICE)["allocated_bytes"] == 20 * MIB
    assert _C.mem_pool_alloc(65 * MIB, DEVICE, 0) == 0
    _C.mem_pool_free(segment, 20 * MIB, DEVICE, 0)
    assert memory.stats(DEVICE)["allocated_bytes"] == 0
    assert all(_C.mem_pool_functions())


def test_a_pool_of_pytorchs_asks_nobody_in_python(pool: _C.CachingPool) -> None:
    with pytest.raises(UseError, match="asks no Python callback"):
        pool.set_on_pressure(lambda _: True)


# What users call ---------------------------------------------------------------------------------


def test_trim_and_limit_are_about_one_device(pool: _C.CachingPool) -> None:
    pool.free(pool.allocate(8 * MIB))
    assert memory.trim(DEVICE, keep=5 * MIB) == 4 * MIB
    memory.set_limit(DEVICE, 2 * MIB)
    assert memory.stats(DEVICE)["reserved_bytes"] == 2 * MIB
    memory.set_limit(DEVICE, None)
    assert memory.trim(f"cuda:{DEVICE}") == 2 * MIB
    pool.free(pool.allocate(8 * MIB))
    with pytest.raises(ConfigError, match="a limit of 0 bytes"):
        memory.set_limit(DEVICE, 0)
    with pytest.raises(ConfigError, match="cpu has no pool"):
        memory.trim("cpu")


def test_a_saved_snapshot_is_what_the_visualiser_reads(
    pool: _C.CachingPool, tmp_path: Path
) -> None:
    from torch.cuda import _memory_viz

    pool.allocate(3 * MIB)
    memory.save_snapshot(tmp_path / "pool.pickle", DEVICE)
    saved = pickle.loads((tmp_path / "pool.pickle").read_bytes())
    assert saved == memory.snapshot(torch.device("cuda", DEVICE))
    assert saved["segments"][0]["device"] == DEVICE
    assert "3.0MiB" in _memory_viz.segsum(saved)


def test_every_figure_of_the_pool_is_told(pool: _C.CachingPool) -> None:
    told = memory.stats(DEVICE)
    assert set(told) == {
        name for name in dir(pool.stats()) if name.endswith("bytes") or "num_" in name
    }


@without_gpu
def test_a_build_without_gpu_refuses_pools_and_installing() -> None:
    for call in (memory.install, memory.pool, memory.stats):
        with pytest.raises(DeviceError, match="no GPU support: reinstall"):
            call()


def test_pytorchs_allocator_is_changed_before_cuda_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    with pytest.raises(UseError, match=r"CUDA is in use.* use blockswap.memory.pool\(\)"):
        memory.install()


def test_an_installed_pool_is_installed_once_and_answers_for_pytorch(
    pool: _C.CachingPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = []
    monkeypatch.setattr("blockswap._C.install_torch_allocator", lambda: installed.append(1))
    monkeypatch.setattr(memory, "_installed", False)
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: False)
    memory.install()
    with pytest.raises(UseError, match="install\\(\\) once"):
        memory.install()
    with pytest.raises(UseError, match="no pool\\(\\) is needed"):
        memory.pool()
    assert installed == [1]
    # Sessions count PyTorch's memory: torch.cuda refuses to tell it now.
    held = pool.allocate(3 * MIB)
    counted = DeviceMemory(torch.device("cuda", DEVICE))
    assert counted.allocated_bytes() == 3 * MIB
    pool.free(held)
    counted.begin_span()
    assert counted.span_peak_bytes() == 0


def test_a_peak_counts_blocks_as_allocated_and_what_is_mapped_around_them_as_the_devices() -> None:
    counted = DeviceMemory(torch.device("cpu"))
    counted.pool = SimpleNamespace(bytes=5 * MIB, unused_bytes=1 * MIB)
    counted.watch()
    counted.note_peak()
    assert (counted.peak_allocated_bytes, counted.peak_device_bytes) == (5 * MIB, 6 * MIB)
    counted.neighbours = [SimpleNamespace(bytes=3 * MIB, leave=lambda: None)]
    counted.note_peak()
    assert (counted.peak_allocated_bytes, counted.peak_device_bytes) == (8 * MIB, 9 * MIB)


def test_an_allocator_in_use_is_named_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise RuntimeError("Can't swap an already initialized allocator")

    monkeypatch.setattr("blockswap._C.install_torch_allocator", refuse)
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: False)
    with pytest.raises(UseError, match="call install\\(\\) earlier"):
        memory.install()
    assert not memory._installed


def test_importing_uses_no_gpu_so_that_installing_can_follow() -> None:
    code = "import torch, blockswap; assert not torch.cuda.is_initialized(); blockswap.memory.trim"
    subprocess.run([sys.executable, "-c", code], check=True)
