"""A host that is slower than the device and its link: what is learned of the device all the same."""

from __future__ import annotations

import time
from types import ModuleType

import torch
from torch import nn

import blockswap

LEAVES = 8
WIDTH = 256  # 256 KiB and more per leaf
HOST_S = 6e-3
DEVICE_S = 1e-3
COPY_S = 4e-3
RING = f"{2 * 4 * WIDTH * (WIDTH + 1)}B"  # two leaves
LEARNING_STEPS = 12


def test_a_slow_host_does_not_count_as_the_devices_time(accelerator: ModuleType) -> None:
    model = nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(LEAVES)]).requires_grad_(False)
    x = torch.randn(2, WIDTH)
    with torch.no_grad():
        expected = model(x)
        for leaf in model:
            leaf.register_forward_hook(lambda *_: time.sleep(HOST_S))
        accelerator.set_body_delay(DEVICE_S)
        accelerator.set_copy_delay(COPY_S / (4 * WIDTH * (WIDTH + 1)))
        with blockswap.attach(model, device="fake", offload="1GB", swap_space=RING) as session:
            on_device = x.to("fake")
            for _ in range(LEARNING_STEPS):
                output = model(on_device)
                if session.state == "ready":
                    break
            report = session.report()
            learned = session._steward.learned
            speed = session._steward.link.speed
        assert session.state != "learning"
        assert torch.equal(output.cpu(), expected)
    # Linear and bias are one operator or two; the host's own time would be six.
    assert sum(learned.seconds.values()) < LEAVES * HOST_S / 2
    assert report.step_ms is not None and report.step_ms > 0.9 * 1e3 * LEAVES * HOST_S
    assert speed < 2 * 4 * WIDTH * (WIDTH + 1) / COPY_S, "the link runs at full speed again"
    assert speed > 0.5 * 4 * WIDTH * (WIDTH + 1) / COPY_S


def test_another_input_shape_does_not_run_on_the_link_that_learning_slowed(
    accelerator: ModuleType,
) -> None:
    model = nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(LEAVES)]).requires_grad_(False)
    for leaf in model:
        leaf.register_forward_hook(lambda *_: time.sleep(HOST_S))
    accelerator.set_copy_delay(COPY_S / (4 * WIDTH * (WIDTH + 1)))
    slowed: list[float] = []
    with (
        torch.no_grad(),
        blockswap.attach(model, device="fake", offload="1GB", swap_space=RING) as session,
    ):
        link = session._steward.link
        slow_down = link.slow_down
        link.slow_down = lambda factor: (slowed.append(factor), slow_down(factor))[1]  # type: ignore[method-assign]
        for rows in (2, 2, 3):  # traced, timed once, and another shape
            model(torch.ones(rows, WIDTH, device="fake"))
    assert max(slowed) > 1.0, "the host set the pace"
    assert slowed[-1] == 1.0
