"""What the fake accelerator promises. Needs its own process: `pytest tests/fake`."""

from __future__ import annotations

import gc
import threading
import time

import pytest
import torch
from torch import nn

from tests import fake

POISON_INT64 = -1
MIB = 1 << 20


@pytest.fixture(scope="session")
def device_module():
    return fake.load()


@pytest.fixture(autouse=True)
def clean(device_module):
    """Every test starts and ends idle, without delays or limits, on stream 0 of device 0."""
    yield
    device_module.drain()
    device_module.set_oom_callback(None)
    for index in range(device_module.device_count()):
        device_module.set_limit(None, index)
        device_module.set_stream(device_module.default_stream(index))
        device_module.reset_peak_memory_stats(index)
    device_module.set_device(0)
    device_module.clear_sync_fallbacks()


# --- streams: what a missing wait looks like -------------------------------------------------------


def test_reader_on_another_stream_without_a_wait_sees_poison(device_module):
    source = torch.arange(1000)
    copy_stream = device_module.Stream()
    device_module.set_copy_delay(0.0, 0.1)
    target = torch.empty(1000, dtype=torch.int64, device="fake")
    with device_module.stream(copy_stream):
        target.copy_(source, non_blocking=True)
    early = target + 0
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
    return result.cpu()


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


# --- events ----------------------------------------------------------------------------------------


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
        )
    )
    thread.start()
    thread.join()
    assert seen == [(0, 0)]
    assert torch.empty(1, device="fake").device.index == 1


# --- memory ----------------------------------------------------------------------------------------


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


# --- operators -------------------------------------------------------------------------------------


def test_views_share_memory(device_module):
    x = torch.zeros(4, 6, device="fake")
    views = [
        x.view(24)[:4], x.t()[0], x[1], x[:, 2:4], x.unsqueeze(0)[0, 2], x.reshape(2, 12)[0],
        x.expand(3, 4, 6)[1, 3], x.permute(1, 0)[5], *x.chunk(2, dim=1), *x.split(2), *x.unbind(0),
        x.detach(), x.as_strided((2,), (1,), 3), x.unfold(1, 2, 2), torch.view_as_complex(x.view(4, 3, 2)),
        x.view(torch.int32), x.diagonal(), x.squeeze(), x.flatten(), x.movedim(0, 1), x.unflatten(1, (2, 3)),
    ]  # fmt: skip
    base = x.untyped_storage().data_ptr()
    assert all(view.untyped_storage().data_ptr() == base for view in views)
    views[0].fill_(7)
    assert (x.cpu().flatten()[:4] == 7).all()


def test_out_arguments_are_resized(device_module):
    out = torch.empty(0, device="fake")
    torch.add(torch.ones(3, 3, device="fake"), 1, out=out)
    assert torch.equal(out.cpu(), torch.full((3, 3), 2.0))


def test_forgotten_move_to_the_device_is_an_error(device_module):
    x = torch.ones(2, 2, device="fake")
    for call in (
        lambda: x + torch.ones(2, 2),
        lambda: x @ torch.ones(2, 2),
        lambda: nn.functional.linear(x, torch.ones(2, 2)),
        lambda: x + torch.ones(2, 2, device="fake:1"),
        lambda: nn.functional.embedding(torch.zeros(2, dtype=torch.int64), x),
    ):
        with pytest.raises(RuntimeError, match="device"):
            call()
    assert ((x + torch.tensor(2.0)).cpu() == 3).all()


def test_failure_on_a_worker_is_raised_at_the_next_wait(device_module):
    table = torch.ones(4, 4, device="fake")
    index = torch.tensor([99], device="fake")
    nn.functional.embedding(index, table)
    with pytest.raises((RuntimeError, IndexError), match="range"):
        device_module.synchronize()
    device_module.synchronize()


def test_wrong_shapes_are_refused_at_once(device_module):
    with pytest.raises(RuntimeError, match="shapes|size"):
        torch.ones(2, 3, device="fake") @ torch.ones(2, 3, device="fake")


OPERATORS = {
    "linear": lambda f, g: f.linear(g(2, 5, 8), g(6, 8), g(6)),
    "conv2d": lambda f, g: f.conv2d(g(2, 4, 9, 9), g(8, 4, 3, 3), g(8), padding=1),
    "conv2d channels last": lambda f, g: f.conv2d(
        g(2, 4, 9, 9).to(memory_format=torch.channels_last), g(8, 4, 3, 3), stride=2
    ),
    "conv3d": lambda f, g: f.conv3d(g(1, 3, 4, 6, 6), g(5, 3, 1, 2, 2), stride=(1, 2, 2)),
    "group_norm": lambda f, g: f.group_norm(g(2, 8, 5, 5), 4, g(8), g(8)),
    "layer_norm": lambda f, g: f.layer_norm(g(2, 3, 16), (16,), g(16), g(16)),
    "rms_norm": lambda f, g: f.rms_norm(g(2, 3, 16), (16,), g(16)),
    "gelu": lambda f, g: f.gelu(g(4, 16), approximate="tanh"),
    "silu": lambda f, g: f.silu(g(4, 16)),
    "softmax": lambda f, g: f.softmax(g(4, 16), -1),
    "attention": lambda f, g: f.scaled_dot_product_attention(
        g(2, 4, 7, 16), g(2, 4, 9, 16), g(2, 4, 9, 16)
    ),
    "interpolate": lambda f, g: f.interpolate(g(1, 2, 4, 4), scale_factor=2.0, mode="nearest"),
    "bilinear": lambda f, g: f.interpolate(g(1, 2, 4, 4), size=(7, 7), mode="bilinear"),
    "pad": lambda f, g: f.pad(g(1, 2, 4), (1, 2)),
    "cat": lambda f, g: torch.cat([g(2, 3), g(2, 4)], 1),
    "stack": lambda f, g: torch.stack([g(2, 3), g(2, 3)], -1),
    "einsum": lambda f, g: torch.einsum("bij,bjk->bik", g(2, 3, 4), g(2, 4, 5)),
    "bmm": lambda f, g: torch.bmm(g(2, 3, 4), g(2, 4, 5)),
    "addmm": lambda f, g: torch.addmm(g(5), g(3, 4), g(4, 5)),
    "where": lambda f, g: torch.where(g(3, 4) > 0, g(3, 4), g(4)),
    "index": lambda f, g: g(5, 4)[[0, 3, 1]],
    "mask": lambda f, g: (lambda x: x[x > 0])(g(5, 4)),
    "assign": lambda f, g: g(5, 4).index_put((torch.tensor([1, 2]),), g(2, 4)),
    "cumsum": lambda f, g: g(3, 4).cumsum(1),
    "mean": lambda f, g: g(3, 4).mean(1, keepdim=True),
    "var": lambda f, g: g(3, 4).var(1),
    "topk": lambda f, g: g(3, 9).topk(3)[0],
    "sort": lambda f, g: g(3, 9).sort(descending=True)[1],
    "cast": lambda f, g: g(3, 4).half().float().to(torch.float64).to(torch.int64),
    "foreach": lambda f, g: torch.cat(torch._foreach_add([g(2), g(3)], 1.0)),
    "repeat": lambda f, g: g(2, 3).repeat_interleave(2, 0).repeat(1, 2),
    "flip and roll": lambda f, g: g(3, 4).flip(0).roll(1, 1),
    "clamp, pow, rsqrt": lambda f, g: g(3, 4).clamp(min=0.1).pow(2).rsqrt(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", OPERATORS)
def test_operator_gives_the_bits_of_the_cpu(device_module, name, dtype):
    def run(device: str) -> torch.Tensor:
        torch.manual_seed(0)
        return OPERATORS[name](nn.functional, lambda *size: torch.randn(size).to(device, dtype))

    assert torch.equal(run("fake").cpu(), run("cpu"))
    assert device_module.sync_fallbacks() == {}


def test_rotary_operators_give_the_bits_of_the_cpu(device_module):
    def run(device: str) -> torch.Tensor:
        torch.manual_seed(0)
        angles = torch.outer(torch.arange(6, device=device), torch.rand(4).to(device))
        turns = torch.polar(torch.ones_like(angles), angles)
        x = torch.randn(2, 6, 8).to(device)
        turned = torch.view_as_real(torch.view_as_complex(x.view(2, 6, 4, 2)) * turns).flatten(2)
        return turned + torch.cat([angles.cos(), angles.sin()], -1)

    assert torch.equal(run("fake").cpu(), run("cpu"))


def test_random_numbers_are_those_of_the_cpu(device_module):
    torch.manual_seed(3)
    expected = [torch.randn(5), torch.rand(5), torch.randint(9, (5,)), torch.randperm(6)]
    torch.manual_seed(3)
    options = {"device": "fake"}
    actual = [
        torch.randn(5, **options), torch.rand(5, **options), torch.randint(9, (5,), **options),
        torch.randperm(6, **options),
    ]  # fmt: skip
    assert all(torch.equal(a.cpu(), e) for a, e in zip(actual, expected, strict=True))
    generator = torch.Generator().manual_seed(1)
    assert torch.equal(
        torch.randn(4, generator=torch.Generator().manual_seed(1)),
        torch.empty(4, device="fake").normal_(generator=generator).cpu(),
    )


def test_autocast_picks_lower_precision_for_matmul_and_fp32_for_norms(device_module):
    x, w = torch.randn(4, 8, device="fake"), torch.randn(8, 8, device="fake")
    with torch.autocast("fake", dtype=torch.bfloat16):
        y = nn.functional.linear(x, w)
        assert y.dtype == torch.bfloat16
        assert nn.functional.layer_norm(y, (8,)).dtype == torch.float32
        assert nn.functional.softmax(y, -1).dtype == torch.float32
    expected = nn.functional.linear(x.cpu().bfloat16(), w.cpu().bfloat16())
    assert torch.equal(y.cpu(), expected)


def test_parameters_move_back_and_forth_and_survive_saving(device_module, tmp_path):
    model = nn.Linear(4, 4)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.to("fake")
    torch.save(model.state_dict(), tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", map_location="fake")
    model.cpu()
    for name, tensor in expected.items():
        assert torch.equal(model.state_dict()[name], tensor)
        assert loaded[name].device.type == "fake" and torch.equal(loaded[name].cpu(), tensor)


def test_inference_mode_runs(device_module):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True)).to("fake")
    with torch.inference_mode():
        y = model(torch.ones(2, 4, device="fake"))
        y.mul_(2)
    assert y.cpu().shape == (2, 4)
