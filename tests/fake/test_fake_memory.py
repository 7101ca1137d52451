"""The fake accelerator counts, limits and poisons its memory."""

from __future__ import annotations

import gc

import pytest
import torch

MIB = 1 << 20


def test_memory_limit_raises_out_of_memory(device_module):
    device_module.set_limit(device_module.memory_allocated() + MIB)
    keep = torch.empty(MIB // 2, dtype=torch.uint8, device="fake")
    with pytest.raises(torch.OutOfMemoryError, match="in use"):
        torch.empty(MIB, dtype=torch.uint8, device="fake")
    del keep
    torch.empty(MIB, dtype=torch.uint8, device="fake")


def test_limits_are_per_device(device_module):
    device_module.set_limit(0, device=0)
    assert torch.ones(10, device="fake:1").device.index == 1


def test_statistics_follow_the_host_not_the_workers(device_module):
    """Running ahead costs no memory: a temporary counts until the host drops it, as on CUDA."""
    gc.collect()
    base = device_module.memory_allocated()
    device_module.reset_peak_memory_stats()
    x = torch.zeros(MIB, dtype=torch.uint8, device="fake")
    device_module.set_body_delay(0.005)
    for _ in range(10):
        x = x + 1
    assert device_module.memory_allocated() == base + MIB
    assert device_module.max_memory_allocated() == base + 2 * MIB
    free, total = device_module.mem_get_info()
    assert total - free == base + MIB
    del x
    device_module.reset_peak_memory_stats()
    assert device_module.max_memory_allocated() == base


def test_torch_accelerator_reads_the_same_statistics(device_module):
    x = torch.zeros(MIB, dtype=torch.uint8, device="fake")  # noqa: F841
    assert torch.accelerator.memory_allocated() == device_module.memory_allocated()
    assert torch.accelerator.max_memory_allocated() == device_module.max_memory_allocated()


def test_oom_callback_may_free_and_the_allocation_succeeds(device_module):
    device_module.set_limit(device_module.memory_allocated() + MIB)
    spare = [torch.empty(MIB, dtype=torch.uint8, device="fake")]
    asked = []

    def shed(device: int, num_bytes: int) -> bool:
        asked.append((device, num_bytes))
        return bool(spare) and (spare.clear() is None)

    device_module.set_oom_callback(shed)
    torch.empty(MIB, dtype=torch.uint8, device="fake")
    assert asked == [(0, MIB)]


def test_fresh_memory_is_poison_and_aligned(device_module):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x = torch.empty(33, dtype=dtype, device="fake")
        assert x.isnan().all() and x.data_ptr() % 256 == 0
