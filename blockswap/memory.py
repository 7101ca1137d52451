"""Our caching pool as PyTorch's allocator.

`install` makes the pool the allocator of the process (`is_installed`), `pool` that of a
part of it; `stats`, `snapshot`, `save_snapshot`, `trim` and `set_limit` are about one device's.
"""

from __future__ import annotations

import pickle
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from blockswap import _C
from blockswap.errors import ConfigError, UseError

Device = torch.device | str | int | None

_NO_LIMIT = 2**63 - 1

_installed = False
_limits: dict[int, int] = {}  # by device, as set by `set_limit`
_plug: Any = None  # PyTorch's object over the pool: it must outlive every MemPool


class _InstalledPool:
    """The calls of `torch.cuda` that it refuses once the pool is its allocator."""

    def memory_allocated(self, device: Device) -> int:
        return stats(device)["allocated_bytes"]

    def memory_reserved(self, device: Device) -> int:
        return stats(device)["reserved_bytes"]

    def max_memory_allocated(self, device: Device) -> int:
        return stats(device)["peak_allocated_bytes"]

    def max_memory_reserved(self, device: Device) -> int:
        return stats(device)["peak_reserved_bytes"]

    def reset_peak_memory_stats(self, device: Device) -> None:
        _pool_of(device).reset_peaks()

    def mem_get_info(self, device: Device) -> tuple[int, int]:
        return torch.cuda.mem_get_info(device)

    def empty_cache(self) -> None:
        torch.cuda.empty_cache()  # reaches the pool

    def get_per_process_memory_fraction(self, device: Device) -> float:
        total = self.mem_get_info(device)[1]
        return min(1.0, _limits.get(_index_of(device), total) / total)

    def set_per_process_memory_fraction(self, fraction: float, device: Device) -> None:
        total = self.mem_get_info(device)[1]
        _pool_of(device).set_limit(_NO_LIMIT if fraction >= 1 else int(fraction * total))


def install() -> None:
    """Make the caching pool PyTorch's allocator of GPU memory, for the rest of the process.

    Call it before anything is on a GPU. `torch.cuda.empty_cache`, `record_stream` and
    `set_per_process_memory_fraction` reach the pool; PyTorch's own statistics and CUDA graphs are
    refused: use `stats` and `snapshot` of this module.

    Raises:
        UseError: installed before, or CUDA is in use: call it first thing.
        DeviceError: this build of blockswap has no GPU support.

    Example:
        >>> import blockswap
        >>> blockswap.memory.install()  # doctest: +SKIP
    """
    global _installed
    if _installed:
        raise UseError("blockswap's pool is PyTorch's allocator already: install() once")
    if torch.cuda.is_initialized():
        raise UseError(
            "CUDA is in use, and PyTorch cannot change its allocator any more: call install() "
            "before the first tensor or call on a GPU, or use blockswap.memory.pool()"
        )
    try:
        _C.install_torch_allocator()
    except RuntimeError as error:
        if "already initialized allocator" not in str(error):
            raise
        raise UseError(f"PyTorch's allocator is in use: call install() earlier ({error})") from None
    _installed = True


def is_installed() -> bool:
    """Say whether `install` has made the pool PyTorch's allocator."""
    return _installed


def pool(device: Device = None) -> torch.cuda.MemPool:
    """Return a pool of PyTorch's that takes its memory from ours; None: the current device.

    Keep it as long as tensors made in it.

    Raises:
        UseError: under `install`, where all memory comes from the caching pool already.
        DeviceError: this build of blockswap has no GPU support.

    Example:
        >>> memory = blockswap.memory.pool()  # doctest: +SKIP
        >>> with torch.cuda.use_mem_pool(memory):  # doctest: +SKIP
        ...     x = torch.zeros(2**20, device="cuda")
    """
    global _plug
    if _installed:
        raise UseError(
            "all memory comes from blockswap's pool under install(): no pool() is needed"
        )
    index = _index_of(device)
    _C.pluggable_pool(index)
    if _plug is None:
        _plug = torch._C._cuda_customAllocator(*_C.mem_pool_functions())
    torch.cuda.init()
    with torch.cuda.device(index):
        return torch.cuda.MemPool(_plug)


def stats(device: Device = None) -> dict[str, int]:
    """Return the figures of a device's pool: bytes in use, mapped and their peaks, and counts.

    Memory under a `pool` counts as in use as long as PyTorch caches it there.
    """
    figures = _pool_of(device).stats()
    return {name: getattr(figures, name) for name in _C.PoolStats.FIELDS}


def snapshot(device: Device = None) -> dict[str, Any]:
    """Return every block of a device's pool as `torch.cuda.memory._snapshot` would."""
    index = _index_of(device)
    taken: dict[str, Any] = _C.pluggable_pool(index).snapshot(index)
    return taken


def save_snapshot(path: str | PathLike[str], device: Device = None) -> None:
    """Write the snapshot to a file for pytorch.org/memory_viz and `torch.cuda._memory_viz`."""
    Path(path).write_bytes(pickle.dumps(snapshot(device)))


def trim(device: Device = None, keep: int = 0) -> int:
    """Give a device's unused memory back, but for `keep` bytes; return the bytes given back.

    Never waits: what a kernel still uses stays.
    """
    return int(_pool_of(device).trim(keep))


def set_limit(device: Device, num_bytes: int | None) -> None:
    """Let a device's pool map no more than that; None: no limit.

    What is unused beyond it goes back at once. Allocations that find no room under it raise
    `torch.OutOfMemoryError`.

    Raises:
        ConfigError: a limit that is not positive.
    """
    if num_bytes is not None and num_bytes <= 0:
        raise ConfigError(f"a limit of {num_bytes} bytes: give a positive number, or None for none")
    _pool_of(device).set_limit(_NO_LIMIT if num_bytes is None else num_bytes)
    _limits[_index_of(device)] = _NO_LIMIT if num_bytes is None else num_bytes


def _pool_of(device: Device) -> _C.CachingPool:
    return _C.pluggable_pool(_index_of(device))


def _index_of(device: Device) -> int:
    if isinstance(device, int):
        return device
    which = torch.device("cuda" if device is None else device)
    if which.type != "cuda":
        raise ConfigError(f"{which} has no pool: name a GPU")
    index: int | None = which.index  # PyTorch's stubs know of no None
    if index is None:
        index = torch.cuda.current_device() if torch.cuda.is_available() else 0
    return index
