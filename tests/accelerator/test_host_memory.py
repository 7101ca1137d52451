"""Weights of which only a part is pinned: right, within the bound, and said."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

import blockswap
from blockswap import _C, host
from blockswap.sizes import format_bytes
from tests.accelerator.test_sessions import STEPS, Chain

MIB = 2**20
WIDTHS = [512, 512, 384, 768, 512, 512, 640, 512, 512]  # 8.9 MiB
WEIGHTS = "1GiB"  # more than there are


def inputs(count: int) -> list[torch.Tensor]:
    return [
        torch.randn(3, WIDTHS[0], generator=torch.Generator().manual_seed(seed))
        for seed in range(count)
    ]


@pytest.mark.parametrize("offload", [WEIGHTS, "5MiB"], ids=["all streamed", "half streamed"])
@pytest.mark.parametrize("copy_streams", [1, 3])
def test_weights_beyond_the_bound_pass_through_a_pinned_ring(
    accelerator: ModuleType, offload: str, copy_streams: int
) -> None:
    model = Chain(WIDTHS, seed=4)
    with torch.no_grad():
        xs = inputs(2 * STEPS)
        expected = [model(x) for x in xs]
        accelerator.set_random_delays(11, 1e-3)
        with blockswap.attach(
            model,
            device="fake",
            offload=offload,
            host_memory="4MiB",
            copy_streams=copy_streams,
            check=True,
        ) as session:
            outputs = [model(x.to("fake")) for x in xs]
            for output, wanted in zip(outputs, expected, strict=True):
                assert torch.equal(output.cpu(), wanted)
            report = session.report()
        assert 2 * MIB < report.pinned_bytes <= 4 * MIB
        assert report.bounce_bytes == MIB
        assert any("not pinned (host_memory), they pass through" in note for note in report.notes)
        text = " ".join(str(report).split())  # lines are wrapped
        assert f"{format_bytes(report.pinned_bytes)} pinned, 1.0 MiB of it a ring" in text


def test_edits_between_steps_reach_weights_that_are_not_pinned(accelerator: ModuleType) -> None:
    model = Chain(WIDTHS, seed=5)
    twin = Chain(WIDTHS, seed=5)
    accelerator.set_copy_delay(2e-9, 1e-4)
    with (
        torch.no_grad(),
        blockswap.attach(model, device="fake", offload="6MiB", host_memory="1MiB", check=True),
    ):
        for step, x in enumerate(inputs(STEPS)):
            for chain in (model, twin):
                layer = chain.layers[step % len(chain.layers)][0]
                layer.weight.data += 0.125
                layer.bias.copy_(layer.bias * 0.5)
            assert torch.equal(model(x.to("fake")).cpu(), twin(x))


def test_a_bound_above_the_weights_pins_them_all_and_needs_no_ring(
    accelerator: ModuleType,
) -> None:
    model = Chain(WIDTHS, seed=6)
    with blockswap.attach(model, device="fake", offload=WEIGHTS, host_memory="64MiB") as session:
        report = session.report()
    assert report.pinned_bytes >= report.host_bytes
    assert report.bounce_bytes == 0
    assert report.notes == ()


@pytest.mark.parametrize("grants", [0, 2 * MIB, 5 * MIB + MIB // 2], ids=["none", "few", "half"])
def test_a_system_that_refuses_to_pin_gets_its_ring_from_what_it_did_pin(
    accelerator: ModuleType, monkeypatch: pytest.MonkeyPatch, grants: int
) -> None:
    pinner = _C.Pinner
    monkeypatch.setattr(_C, "Pinner", lambda device: pinner(device, grants))  # nobody set a bound
    monkeypatch.setattr(host, "CHUNK_BYTES", MIB)
    monkeypatch.setattr(host, "BOUNCE_BYTES", MIB)
    model = Chain(WIDTHS, seed=8)
    x = inputs(1)[0]
    with torch.no_grad():
        expected = model(x)
        with blockswap.attach(model, device="fake", offload=WEIGHTS, check=True) as session:
            for _ in range(STEPS):
                assert torch.equal(model(x.to("fake")).cpu(), expected)
            report = session.report()
    assert report.pinned_bytes <= grants
    assert bool(report.bounce_bytes) == bool(grants)
    assert report.pinned_bytes >= grants - 2 * MIB  # no more was given up than the ring needed


def test_lookahead_zero_and_pause_work_with_unpinned_weights(accelerator: ModuleType) -> None:
    model = Chain(WIDTHS, seed=7)
    x = inputs(1)[0]
    with torch.no_grad():
        expected = model(x)
        with blockswap.attach(
            model, device="fake", offload=WEIGHTS, host_memory="2MiB", lookahead=0, check=True
        ) as session:
            assert torch.equal(model(x.to("fake")).cpu(), expected)
            session.pause()
            assert session.report().pinned_bytes == 0
            session.resume()
            for _ in range(STEPS):
                assert torch.equal(model(x.to("fake")).cpu(), expected)
        assert torch.equal(model(x), expected)
