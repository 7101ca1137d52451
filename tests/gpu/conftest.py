"""Every GPU test gives its device memory back."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch

from blockswap.device_memory import DeviceMemory

# What libraries keep of PyTorch's memory: cuBLAS' workspaces, a compiler's buffers.
KEPT_BYTES = 256 * 2**20


@pytest.fixture(autouse=True)
def gives_its_memory_back() -> Iterator[None]:
    before = held_bytes()
    yield
    kept = held_bytes() - before
    assert kept <= KEPT_BYTES, f"{kept / 2**20:.0f} MiB more are in use than before the test"


def held_bytes() -> int:
    """PyTorch's tensors and the pools of all sessions that are alive."""
    gc.collect()
    torch.cuda.synchronize()
    pools = sum(memory.pool_beside_bytes for memory in DeviceMemory._all)
    return torch.cuda.memory_allocated() + pools
