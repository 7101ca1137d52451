"""The pool beside another GPU: it may read our pages, and is not woken for nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from blockswap import _C

pytestmark = pytest.mark.multi_gpu
MIB = 2**20


def test_another_gpu_reads_and_writes_pages() -> None:
    pool = _C.CachingPool(_C.make_device("cuda", 0), _C.make_gpu_pages(0))
    if not torch.cuda.can_device_access_peer(1, 0):
        pytest.skip("these GPUs do not reach each other")
    address = pool.allocate(64 * MIB)
    here = _C.tensor_over(address, 64 * MIB, "cuda:0").fill_(3)
    there = here.to("cuda:1")
    assert bool((there == 3).all())
    here.copy_(there + 1)
    torch.cuda.synchronize(0)
    torch.cuda.synchronize(1)
    assert bool((here == 4).all())
    pool.free(address)


ON_THE_SECOND = """
import torch
from blockswap import _C
pool = _C.CachingPool(_C.make_device("cuda", 1), _C.make_gpu_pages(1))
pool.free(pool.allocate(2**21))
pool.trim()
assert torch._C._cuda_hasPrimaryContext(1)
assert not torch._C._cuda_hasPrimaryContext(0), "GPU 0 has a context that nobody asked for"
"""


def test_a_gpu_that_nobody_uses_gets_no_context() -> None:
    done = subprocess.run(
        [sys.executable, "-c", ON_THE_SECOND], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
