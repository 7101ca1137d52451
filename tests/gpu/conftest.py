"""Every GPU test gives its device memory back."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch

# What libraries keep for the rest of the process: cuBLAS' workspaces, a compiler's buffers.
KEPT_BYTES = 256 * 2**20


@pytest.fixture(autouse=True)
def gives_its_memory_back() -> Iterator[None]:
    before = held_bytes()
    yield
    kept = held_bytes() - before
    assert kept <= KEPT_BYTES, f"{kept / 2**20:.0f} MiB more are in use than before the test"


def held_bytes() -> int:
    """What the driver has given away, PyTorch's cache not counted: tensors, pools, libraries."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return total - free
