"""Random sequences of input shapes: the same bits, within the cap, and ready at last."""

from __future__ import annotations

import contextlib
import random
from types import ModuleType

import pytest
import torch

import blockswap
from tests.accelerator.test_alternating import MIB, Shaped, installed

WEIGHTS = 6 * MIB
ROUNDS = 40  # in which every shape is to be ready


class Walk:
    """One session; `draw` says which shape runs next, and what happens before."""

    def __init__(self, seed: int, base: int) -> None:
        self.draw = random.Random(seed)
        self.model = Shaped(seed, num_layers=24).eval()
        self.shapes = self.draw.sample([2, 3, 5, 7], self.draw.randint(2, 3))
        bursts = [self.draw.choice([0, MIB, 2 * MIB, 4 * MIB]) for _ in self.shapes]
        self.model.apart.bursts = dict(zip(self.shapes, bursts, strict=True))
        self.expected = {rows: self.model(self.model.take(rows)) for rows in self.shapes}
        share = self.draw.choice([0.2, 0.5, 0.8])
        self.cap = base + max(bursts) + 4 * MIB + int(share * WEIGHTS)
        self.session = blockswap.attach(self.model, device="fake", vram=self.cap, check=True)

    def step(self, rows: int) -> None:
        output = self.model(self.model.take(rows).to("fake")).cpu()
        assert torch.equal(output, self.expected[rows])
        report = self.session.report()
        assert report.peak_device_bytes is not None and report.peak_device_bytes <= self.cap
        self.session.timeline()

    def disturb(self) -> None:
        """Do what may come between two steps."""
        session = self.session
        what = self.draw.choice(["vacate", "part", "pause", "trim", "refresh", "raise", "alone"])
        if what in ("vacate", "part"):
            session.vacate(self.draw.randint(1, 4 * MIB) if what == "part" else None)
        elif what == "pause":
            session.pause()
            session.resume()
        elif what == "raise":
            with contextlib.suppress(RuntimeError):  # another width
                self.model(torch.zeros(2, 3, device="fake"))
        elif what == "alone":
            self.draw.choice(self.model.layers)(self.model.take(2).to("fake"))
        elif what == "trim":
            session.trim()
        else:
            session.refresh()
        session.report()
        session.timeline()


@torch.no_grad()
@pytest.mark.parametrize("seed", range(4))
def test_whatever_sequence_of_shapes_runs_all_are_right_and_share_one_plan_in_the_end(
    accelerator: ModuleType, base: int, seed: int
) -> None:
    walk = Walk(seed, base)
    with walk.session as session:
        for _ in range(30):
            if walk.draw.random() < 0.2:
                walk.disturb()
            walk.step(walk.draw.choice(walk.shapes))
        for _ in range(ROUNDS):
            states = set()
            for rows in walk.shapes:
                walk.step(rows)
                states.add(session.state)
            if states == {"ready"}:
                break
        for rows in walk.shapes * 2:
            walk.step(rows)
        plan = installed(session)
        for rows in walk.shapes * 3:
            walk.step(rows)
            assert session.state == "ready" and installed(session) is plan
