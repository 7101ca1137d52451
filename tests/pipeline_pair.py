"""An attached pipeline beside the same one as diffusers made it; edits are done to both."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pipelines import denoiser_of, draw, make

import blockswap
from blockswap.components import denoisers_of

Edit = Callable[[Any], Any]
State = dict[str, torch.Tensor]


class Pair:
    """An attached pipeline whose plan is settled, and the same one as diffusers made it.

    Args:
        kind: of `pipelines.make`.
        folder: for what it is made of.
        offload: "all", or "half": that much of the denoiser streams.
        first: done to both before one is attached.
    """

    def __init__(self, kind: str, folder: Path, offload: str, first: Edit = lambda _: None) -> None:
        self.kind, self.folder = kind, folder
        self.pipe, call = make(kind, folder)
        self.right, _ = make(kind, folder)
        self.call = call | {"height": 64, "width": 64, "output_type": "latent"}
        self.edit(first)
        size = sum(p.nbytes for p in denoiser_of(self.pipe).parameters())
        off = f"{size // 2}B" if offload == "half" else "1GB"
        self.session = blockswap.attach(self.pipe, device="cpu", offload=off)
        self.settle()
        report = next(iter(self.session.sessions.values())).report()
        assert (report.resident_bytes > size // 4) == (offload == "half")

    def settle(self, **options: Any) -> None:
        """Draw until the plan is settled."""
        for _ in range(3):  # more than once where it finds that blocks are skipped no longer
            if self.session.state != "ready":
                draw(self.pipe, self.call, steps=10, **options)
        assert self.session.state == "ready"

    def draw(self, steps: int = 2, **options: Any) -> np.ndarray:
        """Return what both draw."""
        expected = draw(self.right, self.call, steps, **options)
        assert np.array_equal(draw(self.pipe, self.call, steps, **options), expected)
        return expected

    def edit(self, edit: Edit) -> None:
        """Do the same to both."""
        for pipe in (self.pipe, self.right):
            edit(pipe)

    def draw_while(self, edits: list[Edit], steps: int = 0, **options: Any) -> np.ndarray:
        """Return what both draw while step after step ends with an edit."""

        def edit(pipe: Any, step: int, *_: Any) -> dict[str, Any]:
            if step < len(edits):
                edits[step](pipe)
            return {}

        return self.draw(steps or len(edits) + 1, callback_on_step_end=edit, **options)


def lora(kind: str, seed: int, folder: Path, **options: Any) -> State:
    from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model

    pipe, _ = make(kind, folder)
    parts = {next(iter(denoisers_of(pipe))): ["to_q", "to_k", "proj_mlp", "ff.net.0.proj"]}
    parts |= {"text_encoder": ["q_proj", "fc1"]} if kind == "sdxl" else {}
    generator = torch.Generator().manual_seed(seed)
    state: State = {}
    for part, targets in parts.items():
        config = LoraConfig(r=4, target_modules=targets, **options)
        model = inject_adapter_in_model(config, getattr(pipe, part))
        for name, value in get_peft_model_state_dict(model).items():
            noise = 0.1 * torch.randn(value.shape, generator=generator)
            state[f"{part}.{name}"] = noise + (1.0 if "magnitude" in name else 0.0)
    return state


def loading(state: State, name: str) -> Edit:
    return lambda pipe: pipe.load_lora_weights(dict(state), adapter_name=name)
