"""PyTorch on memory of the caching pool: as the process' allocator, and in a MemPool."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from blockswap import _C, memory
from blockswap.errors import UseError
from tests.pipelines import draw, make

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).resolve().parent.parent.parent
MIB = 2**20


# The process' allocator: it can be changed only before CUDA is used, so in a process of its own ----

INSTALLED = """
import os
import torch
from blockswap import memory
MIB = 2**20
memory.install()
def bytes_of(num_bytes, value):
    return torch.full((num_bytes,), value, dtype=torch.uint8, device="cuda")
"""


def run_installed(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", INSTALLED + code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


WORKLOAD = """
import sys
generator = torch.Generator("cuda").manual_seed(0)
x = torch.randn(4, 3, 64, 64, device="cuda", generator=generator)
conv = torch.nn.Conv2d(3, 64, 3, padding=1).requires_grad_(False)
torch.nn.init.constant_(conv.weight, 0.01)
torch.nn.init.constant_(conv.bias, 0.5)
torch.backends.cudnn.enabled = False  # its choice of algorithm may ask how much memory is free
features = torch.nn.functional.gelu(conv.cuda()(x)).flatten(2)
q = features.half()
out = torch.nn.functional.scaled_dot_product_attention(q, q, q).float() @ features.mT
for _ in range(20):  # memory is used again and again
    out = torch.softmax(out @ out.mT, -1) @ out
torch.save(out.cpu(), sys.stdin.readline().strip())
"""


def test_an_installed_pool_gives_equal_results(tmp_path: Path) -> None:
    results = []
    for name, head in (("plain", "import torch\n"), ("installed", INSTALLED)):
        path = tmp_path / f"{name}.pt"
        tail = (
            "assert memory.stats()['peak_allocated_bytes'] > MIB\n" if name == "installed" else ""
        )
        done = subprocess.run(
            [sys.executable, "-c", head + WORKLOAD + tail],
            cwd=ROOT,
            input=str(path),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        results.append(torch.load(path))
    assert bool(results[0].isfinite().all())
    assert torch.equal(*results)


def test_a_recorded_stream_keeps_memory_from_others_under_install() -> None:
    run_installed("""
side = torch.cuda.Stream()
def read_late(x, cycles):
    with torch.cuda.stream(side):
        y = torch.empty_like(x)
        side.wait_stream(torch.cuda.default_stream())
        torch.cuda._sleep(cycles)
        y.copy_(x)
    x.record_stream(side)
    return y
read_late(bytes_of(64 * MIB, 1), 1)  # loads the kernels, which may wait
bytes_of(64 * MIB, 1)
torch.cuda.synchronize()
torch.cuda.empty_cache()
x = bytes_of(64 * MIB, 5)
y = read_late(x, 10**9)
address = x.data_ptr()
del x
assert memory.stats()["pending_bytes"] == 64 * MIB, memory.stats()
z = bytes_of(64 * MIB, 7)
assert z.data_ptr() != address
assert not side.query() or "BLOCKSWAP_UNDER_MEMCHECK" in os.environ, "the host waited"
torch.cuda.synchronize()
assert bool((y == 5).all()) and bool((z == 7).all())
""")


def test_out_of_memory_is_pytorchs_error_with_our_numbers_under_install() -> None:
    run_installed("""
held = bytes_of(16 * MIB, 1)
for set_limit, text in (
    (lambda: memory.set_limit(0, 64 * MIB), "the limit is 64.0 MiB"),
    (lambda: torch.cuda.set_per_process_memory_fraction(0.001), "the limit is "),
    (lambda: memory.set_limit(0, None), "in all"),
):
    set_limit()
    try:
        torch.empty(2**45, dtype=torch.uint8, device="cuda")
    except torch.cuda.OutOfMemoryError as error:
        assert "16.0 MiB are in use" in str(error), error
        assert text in str(error), error
    else:
        raise AssertionError("32 TiB were had")
assert int(held.max()) == 1
""")


def test_graphs_are_refused_before_they_are_captured_under_install() -> None:
    run_installed("""
x = bytes_of(MIB, 1)
try:
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        x + 1
except RuntimeError as error:
    assert "do not work under blockswap.memory.install()" in str(error), error
else:
    raise AssertionError("a graph was captured")
assert int((x + 1).max()) == 2
""")


def test_emptying_the_cache_gives_memory_back_to_the_device_under_install() -> None:
    run_installed("""
x = bytes_of(512 * MIB, 1)
del x
torch.cuda.synchronize()
before = torch.cuda.mem_get_info()[0]
torch.cuda.empty_cache()
assert torch.cuda.mem_get_info()[0] - before >= 500 * MIB
assert memory.stats()["reserved_bytes"] < 16 * MIB
""")


def test_a_session_streams_under_install() -> None:
    run_installed("""
from tests.session_models import assert_same, attach_ready, make_input, make_pair
model, right = make_pair()
x = make_input().cuda()
session = attach_ready(model, x, device="cuda", offload="2MB")
assert_same(model, right.cuda(), x)
session.detach()
""")


def test_installing_comes_before_cuda() -> None:
    torch.zeros(1, device="cuda")
    with pytest.raises(UseError, match="CUDA is in use"):
        memory.install()


# A MemPool ---------------------------------------------------------------------------------------


@pytest.fixture
def empty_pool() -> Iterator[_C.CachingPool]:
    pool = _C.pluggable_pool(torch.cuda.current_device())
    gc.collect()
    memory.trim()
    pool.reset_peaks()
    yield pool
    memory.set_limit(None, None)


def test_a_pipeline_in_a_mem_pool_draws_the_same_picture(
    tmp_path: Path, empty_pool: _C.CachingPool
) -> None:
    pipe, call = make("flux", tmp_path)
    call = {k: v.to("cuda") if isinstance(v, torch.Tensor) else v for k, v in call.items()}
    pipe.to("cuda")
    expected = draw(pipe, call)
    pipe.to("cpu")
    mem_pool = memory.pool()
    with torch.cuda.use_mem_pool(mem_pool):
        pipe.to("cuda")
        drawn = draw(pipe, call)
    assert np.array_equal(drawn, expected)
    weights = sum(p.nbytes for p in pipe.transformer.parameters())
    assert memory.stats()["peak_allocated_bytes"] >= weights
    pipe.to("cpu")


def test_a_mem_pool_gives_all_back_when_it_dies(empty_pool: _C.CachingPool) -> None:
    before = memory.stats()["allocated_bytes"]  # libraries may keep workspaces
    mem_pool = memory.pool()
    with torch.cuda.use_mem_pool(mem_pool):
        x = torch.ones(64 * MIB, dtype=torch.uint8, device="cuda")
    assert memory.stats()["allocated_bytes"] - before >= 64 * MIB
    assert int(x.max()) == 1
    del x, mem_pool
    gc.collect()
    assert memory.stats()["allocated_bytes"] == before
    assert memory.trim() >= 64 * MIB


def test_the_limit_holds_in_a_mem_pool(empty_pool: _C.CachingPool) -> None:
    memory.set_limit(None, 64 * MIB)
    mem_pool = memory.pool()
    with torch.cuda.use_mem_pool(mem_pool):
        held = torch.ones(32 * MIB, dtype=torch.uint8, device="cuda")
        with pytest.raises(torch.cuda.OutOfMemoryError):
            torch.empty(48 * MIB, dtype=torch.uint8, device="cuda")
        assert int(held.max()) == 1


def test_a_graph_captured_in_a_mem_pool_keeps_its_memory_to_itself(
    empty_pool: _C.CachingPool,
) -> None:
    draw_int = torch.Generator("cuda").manual_seed(0)
    size = (1024, 1024)
    x, weight = (  # small whole numbers: exact in any order
        torch.randint(-2, 3, size, device="cuda", generator=draw_int).float() for _ in range(2)
    )

    def compute() -> torch.Tensor:
        return (x @ weight).relu() + (x @ weight.T).abs()

    compute()  # loads kernels and cuBLAS
    torch.cuda.synchronize()
    mem_pool = memory.pool()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=mem_pool.id):
        out = compute()
    assert memory.stats()["allocated_bytes"] >= out.nbytes
    x.add_(1)
    graph.replay()
    # What others take meanwhile is not the graph's.
    other = [empty_pool.allocate(8 * MIB) for _ in range(8)]
    for address in other:
        _C.tensor_over(address, 8 * MIB, f"cuda:{torch.cuda.current_device()}").fill_(255)
    assert torch.equal(out, compute())
    graph.replay()
    assert torch.equal(out, compute())
    for address in other:
        empty_pool.free(address)
    del out, graph, mem_pool
    gc.collect()
