"""Raises where PyTorch finds no memory, before a library can make do without it.

PyTorch catches its own out-of-memory error of a cuDNN workspace, takes another algorithm, whose
last bits may differ, and keeps that choice for the rest of the process (Conv_v8.cpp, try_configs).
An error of Python is not caught there.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from blockswap.device_memory import DeviceMemory
from blockswap.sizes import format_bytes


class _Watch(NamedTuple):
    device: tuple[str, int]
    can_run_again: Callable[[], bool]


class _Armed(threading.local):
    watch: _Watch | None = None


_armed = _Armed()  # of this thread, which computes
_heard: set[str] = set()  # device types whose allocator tells us


@contextlib.contextmanager
def armed(memory: DeviceMemory, can_run_again: Callable[[], bool]) -> Iterator[None]:
    """Have every request of this thread that finds no memory raise, if it helps.

    Args:
        memory: of the device that is watched.
        can_run_again: whether what computes now can be repeated, with more memory than it has.
    """
    _listen(memory)
    outer = _armed.watch
    try:
        _armed.watch = _Watch(memory.key, can_run_again)
        yield
    finally:
        _armed.watch = outer


def _listen(memory: DeviceMemory) -> None:
    """Ask the allocator to tell, once per process: it never stops."""
    kind = memory.key[0]
    if kind not in _heard:
        _heard.add(kind)
        memory.on_out_of_memory(lambda *told: _hear(kind, *told))


def _hear(kind: str, index: int, num_bytes: int, allowed_bytes: int, free_bytes: int) -> None:
    watch = _armed.watch
    if watch is None or watch.device != (kind, index):
        return
    _armed.watch = None  # one answer is enough
    if watch.can_run_again():
        raise torch.OutOfMemoryError(
            f"PyTorch found no memory for {format_bytes(num_bytes)} on {kind}:{index}: it may"
            f" reserve {format_bytes(allowed_bytes)}, and {format_bytes(free_bytes)} of the device"
            " are free"
        )
    _armed.watch = watch
