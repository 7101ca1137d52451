"""What the fake accelerator promises about streams and events. Needs its own process: `pytest tests/fake`."""

from __future__ import annotations

import gc
import threading
import time

import torch
from torch import nn

POISON_INT64 = -1
MIB = 1 << 20


def test_reader_on_another_stream_without_a_wait_sees_poison(device_module):
    # A process's first call of an operator lasts longer than the copy below.
    torch.empty(1, dtype=torch.int64, device="fake").add(0)
    source = torch.arange(1000)
    copy_stream = device_module.Stream()
    device_module.set_copy_delay(0.0, 0.1)
    target = torch.empty(1000, dtype=torch.int64, device="fake")
    with device_module.stream(copy_stream):
        target.copy_(source, non_blocking=True)
    early = target.add(0)
    device_module.set_copy_delay(0.0, 0.0)
    assert (early.cpu() == POISON_INT64).all()
    device_module.synchronize()
    assert torch.equal(target.cpu(), source)


def test_reader_that_waits_for_the_copy_sees_its_values(device_module):
    source = torch.arange(1000)
    copy_stream = device_module.Stream()
    device_module.set_copy_delay(0.0, 0.05)
    target = torch.empty(1000, dtype=torch.int64, device="fake")
    with device_module.stream(copy_stream):
        target.copy_(source, non_blocking=True)
        ready = copy_stream.record_event()
    device_module.current_stream().wait_event(ready)
    result = target + 0
    assert torch.equal(result.cpu(), source)


def wrap(address: int, num_bytes: int) -> torch.Tensor:
    """Bytes of the device that the tensor does not own, as at::from_blob makes them."""
    storage = torch._C._construct_storage_from_data_pointer(
        address, torch.device("fake:0"), num_bytes
    )
    return torch.empty(0, dtype=torch.uint8, device="fake").set_(storage)


def refill_while_an_operator_reads(device_module, wait_for_done: bool) -> torch.Tensor:
    """Run an operator on a wrapped slot and refill the slot from another stream; return its result."""
    ring = torch.empty(4096, dtype=torch.uint8, device="fake")
    slot = wrap(ring.data_ptr() + 1024, 1024).view(torch.float32)
    slot.fill_(1.0)
    device_module.synchronize()
    copy_stream = device_module.Stream()
    device_module.set_body_delay(0.1)
    result = slot * 2
    done = device_module.current_stream().record_event()
    with device_module.stream(copy_stream):
        if wait_for_done:
            copy_stream.wait_event(done)
        slot.copy_(torch.full((256,), 9.0), non_blocking=True)
    result = result.cpu()
    copy_stream.synchronize()  # the slot dies with this function
    return result


def test_refill_before_the_operator_ran_gives_wrong_values(device_module):
    assert (refill_while_an_operator_reads(device_module, wait_for_done=False) == 18).all()


def test_refill_after_the_operator_ran_gives_right_values(device_module):
    assert (refill_while_an_operator_reads(device_module, wait_for_done=True) == 2).all()


def test_poison_fill_is_stream_ordered(device_module):
    slot = torch.zeros(64, dtype=torch.uint8, device="fake")
    device_module.set_body_delay(0.05)
    before = slot + 0
    started = time.perf_counter()
    slot.fill_(255)
    after = slot + 0
    assert time.perf_counter() - started < 0.04
    assert (before.cpu() == 0).all() and (after.cpu() == 255).all()


def test_operators_return_before_they_ran(device_module):
    x = torch.ones(8, 8, device="fake")
    device_module.set_body_delay(0.1)
    started = time.perf_counter()
    y = nn.functional.gelu(x @ x)
    assert time.perf_counter() - started < 0.1
    assert not device_module.current_stream().query()
    assert torch.equal(y.cpu(), nn.functional.gelu(torch.full((8, 8), 8.0)))


def test_argument_freed_by_the_host_lives_until_its_operator_ran(device_module):
    device_module.set_body_delay(0.05)
    x = torch.ones(1024, device="fake")
    y = x * 3
    del x
    torch.empty(1024, device="fake")
    assert (y.cpu() == 3).all()
    assert device_module.writes_after_free() == 0


def test_write_to_freed_memory_is_noticed(device_module):
    """What happens when an engine frees its ring before the last operator on it has run."""
    ring = torch.empty(4096, dtype=torch.uint8, device="fake")
    slot = wrap(ring.data_ptr(), 1024)
    before = device_module.writes_after_free()
    device_module.set_body_delay(0.05)
    slot.fill_(0)
    del ring
    device_module.synchronize()
    assert device_module.writes_after_free() == before + 1


def test_waiting_for_a_stream_gives_the_gil_back(device_module):
    x = torch.ones(4, device="fake")
    device_module.synchronize()
    device_module.set_body_delay(0.2)
    x.add_(1)
    ticks = []
    thread = threading.Thread(target=lambda: ticks.append(time.perf_counter()), daemon=True)
    started = time.perf_counter()
    thread.start()
    x.cpu()
    thread.join()
    assert ticks[0] - started < 0.15 < time.perf_counter() - started


def test_pinned_memory_is_known_as_pinned(device_module):
    assert torch.ones(4).pin_memory().is_pinned() and not torch.ones(4).is_pinned()
    host = torch.ones(4, device="fake").to("cpu", non_blocking=True)
    assert host.is_pinned()
    device_module.synchronize()
    assert (host == 1).all()


def test_host_tensor_freed_by_the_host_lives_until_its_copy_ran(device_module):
    device_module.set_copy_delay(0.0, 0.05)
    y = torch.full((100_000,), 5.0).to("fake", non_blocking=True)
    gc.collect()
    assert (y.cpu() == 5).all()


def test_copy_to_the_host_blocks_unless_told_otherwise(device_module):
    x = torch.arange(100).to("fake")
    device_module.set_copy_delay(0.0, 0.1)
    assert torch.equal(x.cpu(), torch.arange(100))
    host = torch.zeros(100, dtype=torch.int64)
    host.copy_(x, non_blocking=True)
    assert (host == 0).all()
    device_module.synchronize()
    assert torch.equal(host, torch.arange(100))


def test_copy_between_devices_waits_for_both_and_is_seen_by_both(device_module):
    device_module.set_body_delay(0.02)
    x = torch.ones(100, device="fake:0") * 4
    y = torch.zeros(100, device="fake:1") + 1
    y.copy_(x, non_blocking=True)
    assert ((y + 0).cpu() == 4).all()


def test_copies_take_the_time_they_are_told_to(device_module):
    x = torch.zeros(MIB, dtype=torch.uint8, device="fake")
    device_module.synchronize()
    device_module.set_copy_delay(0.05 / MIB, 0.05)
    started = time.perf_counter()
    x.copy_(torch.ones(MIB, dtype=torch.uint8))
    assert 0.1 <= time.perf_counter() - started < 1


def test_random_delays_do_not_change_results(device_module):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(6)))
    x = torch.randn(4, 32)
    expected = model(x).detach()
    model.to("fake")
    for seed in range(3):
        device_module.set_random_delays(seed, 0.003)
        with torch.no_grad():
            assert torch.equal(model(x.to("fake")).cpu(), expected)


def test_event_is_done_only_after_the_work_before_it(device_module):
    x = torch.ones(4, device="fake")
    device_module.set_body_delay(0.1)
    x.add_(1)
    event = device_module.current_stream().record_event()
    assert not event.query()
    event.synchronize()
    assert event.query() and device_module.current_stream().query()


def test_elapsed_time_measures_the_work_between(device_module):
    x = torch.ones(4, device="fake")
    device_module.synchronize()
    begin, end = device_module.Event(enable_timing=True), device_module.Event(enable_timing=True)
    device_module.set_body_delay(0.05)
    begin.record()
    x.add_(1)
    end.record()
    end.synchronize()
    assert 50 <= begin.elapsed_time(end) < 500


def test_wait_is_for_the_record_made_before_it(device_module):
    """A later record, on a slower stream, neither delays nor releases an earlier wait."""
    slow, fast = device_module.Stream(), device_module.Stream()
    x, y = torch.zeros(4, device="fake"), torch.zeros(4, device="fake")
    device_module.synchronize()
    event = device_module.Event()
    with device_module.stream(fast):
        x.add_(1)
        event.record(fast)
    device_module.current_stream().wait_event(event)
    device_module.set_body_delay(0.3)
    with device_module.stream(slow):
        y.add_(1)
        event.record(slow)
    device_module.set_body_delay(None)
    device_module.current_stream().synchronize()
    assert not slow.query() and not event.query()


def test_streams_come_from_a_pool_of_seven(device_module):
    ids = {device_module.Stream().stream_id for _ in range(14)}
    assert ids == set(range(1, 8))
    assert device_module.Stream("fake:1").device_index == 1


def test_current_stream_and_device_belong_to_the_thread(device_module):
    device_module.set_device(1)
    device_module.set_stream(device_module.Stream(1))
    seen = []
    thread = threading.Thread(
        target=lambda: seen.append(
            (device_module.current_device(), device_module.current_stream().stream_id)
        ),
        daemon=True,
    )
    thread.start()
    thread.join()
    assert seen == [(0, 0)]
    assert torch.empty(1, device="fake").device.index == 1
