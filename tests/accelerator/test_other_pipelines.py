"""Denoisers with names that tell nothing, on the fake accelerator: the cap holds."""

from __future__ import annotations

import gc
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import blockswap
from tests.other_pipelines import make_other, picture

MIB = 2**20
NAMES = {
    "cascade": ["decoder"],
    "wuerstchen": ["decoder"],
    "unclip": ["prior"],
    "ideogram": ["transformer", "unconditional_transformer"],
    "versatile": ["image_unet"],
}


def made(kind: str, folder: Path) -> tuple[Any, dict[str, Any], np.ndarray]:
    """Return a pipeline, its call's arguments, and what it draws unswapped on the fake device."""
    pipe, call = make_other(kind, folder)
    call = {k: v.to("fake") if isinstance(v, torch.Tensor) else v for k, v in call.items()}
    pipe.to("fake")
    expected = picture(pipe, call)
    pipe.to("cpu")
    return pipe, call, expected


def weight_bytes(pipe: Any, kind: str) -> int:
    return sum(p.nbytes for name in NAMES[kind] for p in pipe.components[name].parameters())


@pytest.mark.parametrize("kind", NAMES)
def test_cap_holds_over_all_components_and_the_picture_is_the_same(
    accelerator: ModuleType, kind: str, tmp_path: Path
) -> None:
    pipe, call, expected = made(kind, tmp_path)
    gc.collect()
    cap = accelerator.memory_allocated() + weight_bytes(pipe, kind) // 2 + 6 * MIB
    with blockswap.attach(pipe, device="fake", vram=cap, check=True) as session:
        assert list(session.sessions) == NAMES[kind]
        for _ in range(5):
            accelerator.reset_peak_memory_stats()
            assert np.array_equal(picture(pipe, call), expected)
            assert accelerator.max_memory_allocated() <= cap
    parts = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    assert {p.device.type for part in parts for p in part.parameters()} == {"cpu"}


def test_networks_that_have_the_device_one_after_the_other_come_whole_or_stream_each_in_its_turn(
    accelerator: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("blockswap.components.MOST_WHOLE_BYTES", 3 * MIB)
    pipe, call, expected = made("unclip", tmp_path)
    gc.collect()
    cap = accelerator.memory_allocated() + 8 * MIB
    with blockswap.attach(pipe, device="fake", vram=cap, check=True) as session:
        assert list(session.sessions) == ["prior", "decoder"]
        for _ in range(4):
            accelerator.reset_peak_memory_stats()
            assert np.array_equal(picture(pipe, call), expected)
            assert accelerator.max_memory_allocated() <= cap
        report = session.report()
        assert report.parts["decoder"].streamed_bytes > 2 * MIB
        assert {"super_res_first", "super_res_last"} <= report.guests.keys()


@pytest.mark.parametrize("kind", ["animatediff", "controlnet-xs", "versatile"])
def test_a_component_that_only_lends_its_weights_never_comes_to_the_device(
    accelerator: ModuleType, kind: str, tmp_path: Path
) -> None:
    name = {"animatediff": "motion_adapter", "controlnet-xs": "controlnet"}.get(kind, "text_unet")
    pipe, call, expected = made(kind, tmp_path)
    donor = pipe.components[name]
    before = sorted(vars(donor))
    with blockswap.attach(pipe, device="fake", offload="1GB", check=True) as session:
        pipe.to("fake")
        for _ in range(2):
            assert np.array_equal(picture(pipe, call), expected)
            assert {p.device.type for p in donor.parameters()} == {"cpu"}
        assert name not in session.sessions and name not in session.report().guests
    assert sorted(vars(donor)) == before
