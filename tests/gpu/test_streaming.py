"""What only a GPU can show: asynchronous copies against real kernels. `pytest -m gpu`."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import blockswap
from blockswap.bench import zoo

pytestmark = pytest.mark.gpu
MIB = 2**20


class Tower(nn.Module):
    """Linears of 32 MiB: a copy takes 0.6 ms; `rows` decides whether compute takes longer."""

    def __init__(self, layers: int = 12, width: int = 4096) -> None:
        super().__init__()
        with torch.device("cuda"):
            self.layers = nn.ModuleList(
                nn.Sequential(nn.Linear(width, width, dtype=torch.bfloat16), nn.GELU())
                for _ in range(layers)
            )
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def expected_of(model: nn.Module, *inputs: torch.Tensor) -> list[torch.Tensor]:
    with torch.no_grad():
        outputs = [model(x).clone() for x in inputs]
    model.to("cpu")
    return outputs


@pytest.mark.parametrize("rows", [16, 65536], ids=["copies outlast", "compute outlasts"])
@pytest.mark.parametrize("check", [False, True], ids=["plain", "poisoned"])
@pytest.mark.parametrize("streams", [1, 4])
def test_streamed_tower_is_bit_identical(rows: int, check: bool, streams: int) -> None:
    model = Tower()
    x = torch.randn(rows, 4096, device="cuda", dtype=torch.bfloat16)
    (expected,) = expected_of(model, x)
    with (
        torch.no_grad(),
        blockswap.attach(model, offload="1GiB", check=check, copy_streams=streams) as session,
    ):
        for _ in range(12):
            assert torch.equal(model(x), expected)
        assert session.state == "ready"
        assert session.report().streamed_bytes >= 12 * 32 * MIB


def test_fifty_steps_with_random_host_delays_and_no_wait_between_them() -> None:
    model = Tower()
    inputs = [torch.randn(64, 4096, device="cuda", dtype=torch.bfloat16) for _ in range(50)]
    expected = expected_of(model, *inputs)
    draw = random.Random(0)
    handles = [
        layer.register_forward_hook(lambda *_: time.sleep(draw.random() * 2e-3))
        for layer in model.layers
    ]
    with torch.no_grad(), blockswap.attach(model, offload="256MiB", check=True):
        outputs = [model(x) for x in inputs]
        assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode", "autocast"])
def test_bit_identical_in_every_mode(mode: str) -> None:
    contexts: dict[str, Callable[[], Any]] = {
        "no_grad": torch.no_grad,
        "inference_mode": torch.inference_mode,
        "autocast": lambda: torch.autocast("cuda", dtype=torch.bfloat16),
    }
    model = nn.Sequential(*[nn.Sequential(nn.Linear(1024, 1024), nn.SiLU()) for _ in range(8)])
    model.requires_grad_(False).cuda()
    x = torch.randn(32, 1024, device="cuda")
    with contexts[mode]():
        expected = model(x)
        model.to("cpu")
        with blockswap.attach(model, offload="16MiB", check=True):
            for _ in range(10):
                assert torch.equal(model(x), expected)


@pytest.mark.parametrize("kind", ["flux", "sdxl", "wan", "qwen"])
def test_tiny_diffusers_models_are_bit_identical(kind: zoo.Kind) -> None:
    model = zoo.build(kind, "tiny", torch.bfloat16, "cuda", 0)
    inputs = zoo.make_inputs(kind, model, "cuda", torch.bfloat16, 1)
    with torch.no_grad():
        expected = model(**inputs)[0].clone()
        for options in ({"offload": "1GiB"}, {"mode": "layerwise"}, {"offload": 1}, {}):
            with blockswap.attach(model, check=True, **options):
                for _ in range(12):
                    assert torch.equal(model(**inputs)[0], expected), options
            assert torch.equal(model(**inputs)[0], expected)  # back on the GPU, bit for bit


def add_to_data(layer: nn.Linear) -> None:
    layer.weight.data += 0.01


def copy_in(layer: nn.Linear) -> None:
    layer.weight.copy_(layer.weight * 1.5)


def new_parameter(layer: nn.Linear) -> None:
    layer.weight = nn.Parameter(layer.weight * 0.5, requires_grad=False)


def load_state(layer: nn.Linear) -> None:
    layer.load_state_dict({key: value * 0.9 for key, value in layer.state_dict().items()})


EDITS: dict[str, Callable[[nn.Linear], None]] = {
    "data +=": add_to_data,
    "copy_": copy_in,
    "new Parameter": new_parameter,
    "load_state_dict": load_state,
}


@pytest.mark.parametrize("edit", EDITS, ids=list(EDITS))
@pytest.mark.parametrize("offload", [None, "192MiB", "1GiB"], ids=["all", "half", "none"])
def test_edit_between_steps_equals_the_same_edit_unswapped(edit: str, offload: str | None) -> None:
    torch.manual_seed(0)
    model = Tower()
    x = torch.randn(16, 4096, device="cuda", dtype=torch.bfloat16)
    linears = [layer[0] for layer in model.layers]
    model.to("cpu")
    plain = Tower()
    plain.load_state_dict(model.state_dict())
    plain.to("cpu")
    with torch.no_grad(), blockswap.attach(model, offload=offload) as session:
        for _ in range(12):
            model(x)
        assert session.state == "ready"
        for number in (0, 5, 11):
            EDITS[edit](linears[number])
            EDITS[edit](plain.layers[number][0])
            wanted = plain.to("cuda")(x)
            plain.to("cpu")
            assert torch.equal(model(x), wanted), number
            assert torch.equal(model(x), wanted), number


def test_peak_stays_under_the_cap() -> None:
    model = Tower(layers=24)
    x = torch.randn(512, 4096, device="cuda", dtype=torch.bfloat16)
    (expected,) = expected_of(model, x)
    cap = torch.cuda.memory_allocated() + 400 * MIB
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    peak = 0
    with torch.no_grad(), blockswap.attach(model, vram=cap) as session:
        for _ in range(12):
            assert torch.equal(model(x), expected)
            report = session.report()
            peak = max(peak, torch.cuda.max_memory_allocated() + report.pool_bytes)
        assert session.state == "ready"
        assert peak <= report.peak_allocated_bytes <= cap
        # The cap is used, whoever sets the pace.
        assert report.resident_bytes + report.ring_bytes > 200 * MIB


def test_peak_counts_what_was_on_the_device_at_once() -> None:
    model = Tower()
    x = torch.randn(16, 4096, device="cuda", dtype=torch.bfloat16)
    model.to("cpu")
    with torch.no_grad(), blockswap.attach(model, offload="64MiB") as session:
        for _ in range(12):
            model(x)
        before = session.report()
        session.vacate()
        torch.empty(before.pool_bytes // 2, dtype=torch.uint8, device="cuda")  # in its place
        model(x)
        after = session.report()
        assert after.pool_bytes == before.pool_bytes
        assert after.peak_allocated_bytes == before.peak_allocated_bytes
        assert after.peak_device_bytes >= after.peak_allocated_bytes


def test_throttled_link_keeps_the_rate_within_two_percent() -> None:
    model = Tower()
    x = torch.randn(16, 4096, device="cuda", dtype=torch.bfloat16)
    model.to("cpu")
    for rate in (25.0, 12.5):
        with torch.no_grad(), blockswap.attach(model, offload="1GiB", throttle=rate) as session:
            seen = []
            while len(seen) < 5 and pytest.approx(rate, rel=0.02) not in seen:  # others on the host
                for _ in range(10):
                    model(x)
                seen.append(session.report().link_gb_per_s)
            assert pytest.approx(rate, rel=0.02) in seen, session.report().idle_link_gb_per_s
