"""Whole sessions on the fake accelerator: the same bits, whatever the delays."""

from __future__ import annotations

import gc
import itertools
import random
from types import ModuleType

import pytest
import torch
from torch import nn

import blockswap
from blockswap.bench import zoo

MIB = 2**20
STEPS = 12  # learning takes six to ten


class Chain(nn.Module):
    """Linears of unequal size in blocks; `skip` and `repeat` name blocks that misbehave."""

    def __init__(self, widths: list[int], seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        layers = []
        for inner, outer in itertools.pairwise(widths):
            layer = nn.Sequential(nn.Linear(inner, outer), nn.Tanh(), nn.LayerNorm(outer))
            for parameter in layer.parameters():
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
            layers.append(layer)
        self.layers = nn.ModuleList(layers)
        self.skip: set[int] = set()
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for index, layer in enumerate(self.layers):
            if index not in self.skip or layer[0].in_features != layer[0].out_features:
                x = layer(x)
        return x


def on_fake(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The unswapped model's output on the fake device."""
    model.to("fake")
    with torch.no_grad():
        output = model(**inputs)[0].cpu()
    model.to("cpu")
    return output


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["flux", "sdxl", "wan", "qwen"])
def test_real_model_streams_bit_identical(
    accelerator: ModuleType, kind: zoo.Kind, dtype: torch.dtype
) -> None:
    model = zoo.build(kind, "tiny", dtype, "cpu", 0)
    inputs = zoo.make_inputs(kind, model, "fake", dtype, 1)
    expected = on_fake(model, inputs)
    accelerator.set_copy_delay(2e-9, 1e-4)
    weights = sum(p.nbytes for p in model.parameters())
    with blockswap.attach(model, device="fake", offload=f"{2 * weights // 3}B", check=True) as s:
        for _ in range(STEPS):
            with torch.no_grad():
                assert torch.equal(model(**inputs)[0].cpu(), expected)
        assert s.state == "ready"
        assert s.report().streamed_bytes > 0
    with torch.no_grad():
        cpu = zoo.make_inputs(kind, model, "cpu", dtype, 1)
        assert torch.isfinite(model(**cpu)[0]).all()  # ordinary CPU weights again


@pytest.mark.parametrize("slow", ["copies", "compute"])
def test_copies_may_outlast_compute_and_the_other_way_round(
    accelerator: ModuleType, slow: str
) -> None:
    model = Chain([128] * 9, seed=0)
    x = torch.randn(4, 128, generator=torch.Generator().manual_seed(1)).to("fake")
    with torch.no_grad():
        model.to("fake")
        expected = model(x).cpu()
        model.to("cpu")
        if slow == "copies":
            accelerator.set_copy_delay(1e-7, 1e-3)
        else:
            accelerator.set_body_delay(2e-3)
        with blockswap.attach(model, device="fake", offload="1GB", check=True):
            for _ in range(STEPS):
                assert torch.equal(model(x).cpu(), expected)


def test_fifty_steps_with_random_delays_and_no_wait_between_them(accelerator: ModuleType) -> None:
    model = Chain([128, 192, 64, 128, 256, 128, 128], seed=2)
    inputs = [torch.randn(3, 128, generator=torch.Generator().manual_seed(i)) for i in range(50)]
    with torch.no_grad():
        expected = [model(x) for x in inputs]
        on_device = [x.to("fake") for x in inputs]
        accelerator.set_random_delays(7, 1e-3)
        with blockswap.attach(model, device="fake", offload="1GB", check=True) as session:
            outputs = [model(x) for x in on_device]
            for output, wanted in zip(outputs, expected, strict=True):
                assert torch.equal(output.cpu(), wanted)
            assert session.state == "ready"


def random_case(seed: int) -> None:
    """One random model, setting and order of blocks, compared step by step."""
    draw = random.Random(seed)
    width = draw.choice([32, 64])
    widths = [width]
    choices = [width, width, 2 * width, width // 2]
    widths += [draw.choice(choices) for _ in range(draw.randint(2, 7))]
    widths.append(width)
    model = Chain(widths, seed)
    share = draw.choice([0.3, 0.6, 1.0])
    weights = sum(p.nbytes for p in model.parameters())
    options: dict[str, object] = {"offload": f"{int(share * weights)}B"}
    if draw.random() < 0.4:
        options["block_size"] = draw.choice([1, 8192, 40000])
    if draw.random() < 0.3:
        options["lookahead"] = draw.choice([0, 1, 2])
    if draw.random() < 0.3:
        options["copy_streams"] = 2
    if draw.random() < 0.2:
        options = {"mode": "layerwise"}
    x = torch.randn(2, width, generator=torch.Generator().manual_seed(seed))
    on_device = x.to("fake")
    with blockswap.attach(model, device="fake", check=draw.random() < 0.7, **options):
        for step in range(11):
            if draw.random() < 0.2:
                model.skip = {draw.randrange(len(model.layers))}
            elif draw.random() < 0.3:
                model.skip = set()
            if draw.random() < 0.15:
                index = draw.randrange(len(model.layers))
                model.layers[index][0].weight.data += 0.01
            output = model(on_device).cpu()
            assert torch.equal(output, model_on_cpu(model, x)), (seed, step, options)


def model_on_cpu(model: Chain, x: torch.Tensor) -> torch.Tensor:
    """The same weights, read through the model between its steps, run without blockswap."""
    copy = Chain([layer[0].in_features for layer in model.layers] + [x.shape[1]], 0)
    copy.load_state_dict({name: value.clone() for name, value in model.state_dict().items()})
    copy.skip = model.skip
    return copy(x)


@pytest.mark.parametrize("part", range(10))
def test_hundred_random_cases_are_bit_identical(accelerator: ModuleType, part: int) -> None:
    accelerator.set_random_delays(part, 1e-4)
    with torch.no_grad():
        for seed in range(100 * part, 100 * part + 100):
            random_case(seed)


def test_copies_run_on_as_many_streams_as_asked(accelerator: ModuleType) -> None:
    model = Chain([64] * 8, seed=3)
    x = torch.ones(1, 64, device="fake")
    before = None
    for streams in (1, 3):
        with blockswap.attach(model, device="fake", offload="1GB", copy_streams=streams) as session:
            with torch.no_grad():
                outputs = [model(x).cpu() for _ in range(STEPS)]
            assert session.config.copy_streams == streams
            before = outputs[0] if before is None else before
            assert all(torch.equal(output, before) for output in outputs)


def test_pool_is_the_only_memory_that_streaming_takes(accelerator: ModuleType) -> None:
    gc.collect()
    accelerator.drain()
    before = accelerator.memory_allocated()  # diffusers caches some tables for good
    model = Chain([256] * 9, seed=4)
    weights = sum(p.nbytes for p in model.parameters())
    x = torch.ones(1, 256, device="fake")
    with torch.no_grad(), blockswap.attach(model, device="fake", offload="1GB") as session:
        for _ in range(STEPS):
            model(x)
        accelerator.synchronize()
        report = session.report()
        assert report.pool_bytes < weights / 2
        assert accelerator.memory_allocated() - before < weights / 2
    accelerator.drain()
    del x
    assert accelerator.memory_allocated() - before < weights / 8


def test_layerwise_without_a_cap_takes_the_least_memory(accelerator: ModuleType) -> None:
    model = Chain([256] * 9, seed=5)
    x = torch.ones(1, 256, device="fake")
    with torch.no_grad(), blockswap.attach(model, device="fake", mode="layerwise") as session:
        for _ in range(STEPS):
            model(x)
        report = session.report()
        assert report.resident_bytes < report.leaf_bytes / 50  # small parameters only
        assert report.ring_bytes < 2 * 256 * 257 * 4


def test_the_hosts_own_time_is_learned_apart_from_the_devices(accelerator: ModuleType) -> None:
    model = Chain([512] * 6, seed=6)
    x = torch.ones(64, 512, device="fake")
    with torch.no_grad(), blockswap.attach(model, device="fake", offload=3) as session:
        for _ in range(STEPS):
            model(x)
        accelerator.synchronize()
        learned = session._steward.learned
        assert learned.host_seconds_per_copy > 0
        assert sum(learned.host_seconds.values()) + learned.head_host_seconds > 0
        assert session._steward.plans.plan.host_seconds > learned.host_seconds_per_copy


def test_two_models_of_a_step_stream_in_one_cycle(accelerator: ModuleType) -> None:
    models = [Chain([128] * 7, seed=seed) for seed in (0, 1)]
    x = torch.randn(4, 128, generator=torch.Generator().manual_seed(1)).to("fake")
    with torch.no_grad():
        for model in models:
            model.to("fake")
        expected = models[1](models[0](x)).cpu()
        for model in models:
            model.to("cpu")
    accelerator.set_copy_delay(0.0, 5e-4)
    with blockswap.attach(*models, device="fake", offload="1GB", check=True) as session:
        for step in range(STEPS):
            with torch.no_grad():
                assert torch.equal(models[1](models[0](x)).cpu(), expected), f"step {step}"
        assert session.state == "ready"
        assert session.report().steps == STEPS


def test_report_remembers_the_peak_of_all_steps_since_attach(accelerator: ModuleType) -> None:
    model = Chain([64] * 9, seed=0)
    small, large = (torch.randn(rows, 64, device="fake") for rows in (8, 40_000))
    before = accelerator.memory_allocated()
    with torch.no_grad(), blockswap.attach(model, device="fake", offload="64KiB") as session:
        model(large)
        peak = session.report().peak_allocated_bytes
        assert peak is not None
        assert peak >= before + 2 * large.nbytes  # a layer's input and output
        for _ in range(STEPS):
            model(small)
        assert session.report().peak_allocated_bytes == peak
        session.pause()
        session.resume()
        model(small)
        assert session.report().peak_allocated_bytes == peak
        assert session.report().peak_device_bytes >= peak


def test_sessions_of_one_device_do_not_lose_each_others_peaks(accelerator: ModuleType) -> None:
    first, second = (Chain([64] * 9, seed=seed) for seed in (0, 1))
    small, large = (torch.randn(rows, 64, device="fake") for rows in (8, 40_000))
    with (
        torch.no_grad(),
        blockswap.attach(first, device="fake", offload="64KiB") as session,
        blockswap.attach(second, device="fake", offload="64KiB"),
    ):
        first(large)
        second(small)
        assert session.report().peak_allocated_bytes >= 3 * large.nbytes


def test_a_larger_input_of_a_later_model_keeps_the_cap(accelerator: ModuleType) -> None:
    models = [Chain([512] * 9, seed=seed) for seed in (0, 1)]  # of 8 MiB each
    small, large = (torch.randn(rows, 512, device="fake") for rows in (8, 1024))  # 2 MiB
    cap = accelerator.memory_allocated() + 14 * MIB
    with torch.no_grad(), blockswap.attach(*models, device="fake", vram=cap) as session:
        for _ in range(STEPS):
            models[1](models[0](small))
        assert session.report().pool_bytes > 6 * MIB  # with which the large input would not fit
        for _ in range(2 * STEPS):
            models[0](small)
            models[1](large)
        assert session.state == "ready"
        assert session.report().peak_allocated_bytes <= cap
