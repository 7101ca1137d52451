"""Edits of a pipeline that a user makes between calls: each is (pipe, by) -> None.

``by`` holds adapters' weights, schedulers, and dice; equal dice make equal edits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import diffusers
from torch import nn

from tests.pipelines import denoiser_of

FLOW = diffusers.FlowMatchEulerDiscreteScheduler.from_config
SCHEDULERS: dict[str, list[Callable[[Any], Any]]] = {
    "flux": [partial(FLOW, shift=3.0), partial(FLOW, shift=1.0)],
    "sdxl": [diffusers.EulerDiscreteScheduler.from_config, diffusers.DDIMScheduler.from_config],
}


def adapters(pipe: Any) -> list[str]:
    return sorted({name for names in pipe.get_list_adapters().values() for name in names})


def load_an_adapter(pipe: Any, by: SimpleNamespace) -> None:
    name = by.dice.choice(list(by.loras))
    if name not in adapters(pipe):
        pipe.load_lora_weights(dict(by.loras[name]), adapter_name=name)


def weigh_adapters(pipe: Any, by: SimpleNamespace) -> None:
    if names := adapters(pipe):
        pipe.set_adapters(names, [by.dice.uniform(-1.0, 1.0) for _ in names])


def fuse_adapters(pipe: Any, by: SimpleNamespace) -> None:
    if adapters(pipe):
        pipe.fuse_lora(lora_scale=by.dice.uniform(0.2, 1.0))


def unfuse_adapters(pipe: Any, by: SimpleNamespace) -> None:
    if adapters(pipe):
        pipe.unfuse_lora()


def delete_an_adapter(pipe: Any, by: SimpleNamespace) -> None:
    if names := adapters(pipe):
        pipe.delete_adapters(by.dice.choice(names))


def scale_weights(pipe: Any, by: SimpleNamespace) -> None:
    for part in (denoiser_of(pipe), pipe.text_encoder, pipe.vae):
        for parameter in by.dice.sample(list(part.parameters()), 3):
            parameter.data *= by.dice.choice([0.9, 1.1])


def load_values(pipe: Any, by: SimpleNamespace) -> None:
    model = denoiser_of(pipe)
    model.load_state_dict({name: value * 0.99 for name, value in model.state_dict().items()})


def new_parameter(pipe: Any, by: SimpleNamespace) -> None:
    leaves = [m for m in denoiser_of(pipe).modules() if isinstance(m, nn.Linear)]
    leaf = by.dice.choice(leaves)
    leaf.weight = nn.Parameter(leaf.weight.detach() * 1.1, requires_grad=False)


def another_scheduler(pipe: Any, by: SimpleNamespace) -> None:
    pipe.scheduler = by.dice.choice(by.schedulers)(pipe.scheduler.config)


def toggle_tiling(pipe: Any, by: SimpleNamespace) -> None:
    (pipe.vae.disable_tiling if pipe.vae.use_tiling else pipe.vae.enable_tiling)()


def undo_all_but_values(pipe: Any, by: SimpleNamespace) -> None:
    pipe.unload_lora_weights()
    pipe.vae.disable_tiling()
    pipe.scheduler = by.schedulers[0](pipe.scheduler.config)


EDITS = [load_an_adapter, weigh_adapters, fuse_adapters, unfuse_adapters, delete_an_adapter]
EDITS += [new_parameter, another_scheduler, toggle_tiling, load_values, undo_all_but_values]
EDITS += [scale_weights] * 3
