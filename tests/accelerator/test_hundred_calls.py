"""A long day: edits, other sizes and interruptions at random; images right, memory flat."""

from __future__ import annotations

import gc
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from torch import nn

import blockswap
from tests.pipelines import draw, make
from tests.random_edits import EDITS, SCHEDULERS, undo_all_but_values
from tests.test_pipeline_edits import denoiser_of, lora

MIB = 2**20
CALLS, WARM_CALLS, CALLS_PER_CENSUS = 100, 30, 10
PLAIN = {"height": 64, "width": 64, "num_images_per_prompt": 1}
OTHERS = [{"num_images_per_prompt": 2}, {"height": 96}, {"height": 128, "width": 96}]
SHAPES = [PLAIN] * 6 + [PLAIN | other for other in OTHERS]
ACTS = ["pause", "detach", "trim", "refresh", "report"]
STOPS = ["denoiser", "Ctrl-C", "encoder", "VAE", "callback", "pipe._interrupt"]


class UsersError(Exception):
    """What a user's own code raises."""


class Day:
    """An attached pipeline, and a twin of equal weights that is not: it computes on the CPU."""

    def __init__(self, accelerator: ModuleType, kind: str, seed: int, folder: Path) -> None:
        self.accelerator = accelerator
        self.dice = random.Random(seed)
        loras = {name: lora(kind, n, folder) for n, name in enumerate(("one", "two"))}
        self.by = SimpleNamespace(loras=loras, schedulers=SCHEDULERS[kind])
        (self.pipe, self.call), (self.twin, _) = make(kind, folder), make(kind, folder)
        for pipe in (self.pipe, self.twin):
            pipe.vae.enable_slicing()  # convolutions of a batch have other bits on the CPU
        weights = sum(p.nbytes for p in denoiser_of(self.pipe).parameters())
        self.base = accelerator.memory_allocated()
        self.cap = self.base + weights // 2 + 8 * MIB
        self.happened: Counter[str] = Counter()
        self.pictures: set[bytes] = set()
        self.attach()

    def attach(self) -> None:
        self.session = blockswap.attach(self.pipe, device="fake", vram=self.cap, check=True)

    def sometimes(self, what: list[Any], share: float) -> Any:
        return self.dice.choice(what) if self.dice.random() < share else None

    def edit(self, edit: Callable[[Any, SimpleNamespace], None]) -> None:
        seed = self.dice.random()
        for pipe in (self.pipe, self.twin):
            self.by.dice = random.Random(seed)
            edit(pipe, self.by)

    def act(self, act: str) -> None:
        getattr(self.session, act)()
        if act in ("pause", "detach"):
            self.attach()  # it resumes what is paused

    def go(self, shape: dict[str, int], steps: int, stop: str | None = None) -> None:
        """Draw with both pipelines and compare; of an interrupted call nothing is to compare."""
        call, at = self.call | shape, self.dice.randrange(steps)
        parts = {"encoder": self.pipe.text_encoder, "VAE": self.pipe.vae.decoder}
        part = parts.get(str(stop), denoiser_of(self.pipe))
        leaf = self.dice.choice([m for m in part.modules() if m._parameters])
        left = SimpleNamespace(calls=0 if stop in parts else at)
        is_late = stop in ("callback", "pipe._interrupt")

        def fail(*_: object) -> None:
            left.calls -= 1
            if left.calls < 0 and stop and not is_late:
                raise KeyboardInterrupt if stop == "Ctrl-C" else UsersError

        def end_step(pipe: Any, step: int, *_: object) -> dict[str, Any]:
            if step == at and stop == "callback":
                raise UsersError
            pipe._interrupt = step == at
            return {}

        if is_late:
            call["callback_on_step_end"] = end_step
        self.accelerator.reset_peak_memory_stats()
        handle = leaf.register_forward_hook(fail)
        try:
            picture = draw(self.pipe, call, steps)
        except (UsersError, KeyboardInterrupt):
            self.happened["interrupted"] += 1
        else:
            assert np.array_equal(picture, draw(self.twin, call, steps))
            self.pictures.add(picture.tobytes())
        handle.remove()
        assert self.accelerator.max_memory_allocated() <= self.cap
        self.happened[self.session.state] += 1

    def census(self) -> Counter[str]:
        """Count what is alive after one plain call of a pipeline without adapters."""
        self.edit(undo_all_but_values)
        self.act("pause")
        self.go(PLAIN, steps=2)
        for session in self.session.sessions.values():
            session.vacate()
        self.accelerator.synchronize()
        gc.collect()
        kinds = [type(one) for one in gc.get_objects()]
        parts = [part for part in self.pipe.components.values() if isinstance(part, nn.Module)]
        modules = [module for part in parts for module in part.modules()]
        count = Counter(kind.__name__ for kind in kinds if "'blockswap." in str(kind))
        count["tensors"] = sum(issubclass(kind, torch.Tensor) for kind in kinds)
        count["hooks"] = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules)
        count["device bytes"] = self.accelerator.memory_allocated() - self.base
        count["host bytes"] = sum(r.host_bytes for r in self.session.report().parts.values())
        return count


@pytest.mark.slow
@pytest.mark.timeout(900)  # a minute and a half; more on a busy machine
@pytest.mark.parametrize(("kind", "seed"), [("flux", 0)])
def test_a_hundred_calls_draw_the_right_images_and_leave_memory_flat(
    accelerator: ModuleType, kind: str, seed: int, tmp_path: Path
) -> None:
    day = Day(accelerator, kind, seed, tmp_path)
    counts: list[Counter[str]] = []
    resident_bytes: list[int] = []
    for call in range(1, CALLS + 1):
        if edit := day.sometimes(EDITS, 0.65):
            day.edit(edit)
        if act := day.sometimes(ACTS, 0.25):
            day.act(act)
        day.go(day.dice.choice(SHAPES), day.dice.randint(1, 3), day.sometimes(STOPS, 0.35))
        if call >= WARM_CALLS and call % CALLS_PER_CENSUS == 0:
            counts.append(day.census())
            resident_bytes.append(psutil.Process().memory_info().rss)
    assert all(count == counts[0] for count in counts), counts
    assert max(resident_bytes) < resident_bytes[0] + 64 * MIB, "two copies of the weights"
    assert day.happened["interrupted"] > 15 and day.happened["ready"] > 0, day.happened
    assert len(day.pictures) > 40, "edits and shapes change little"
    day.session.detach()
    assert accelerator.memory_allocated() - day.base < 2**12, "more than a scheduler's numbers"
