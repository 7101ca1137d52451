"""The benchmark of whole pipelines: what it computes, and that every recipe runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import blockswap
from benchmarks import pipelines
from benchmarks.phases import Part, Phase, cap_for, floor_seconds, least_bytes, phases_of
from benchmarks.recipes import RECIPES, Source
from benchmarks.recipes.source import num_words, word_tokenizer
from blockswap.room import cap_margin_bytes

GB = 10**9
# Billions of parameters, as published.
T5_XXL, UMT5_XXL, CLIP_L, CLIP_G = 4.76, 5.68, 0.123, 0.695
PUBLISHED = {
    "sdxl": {"unet": 2.567, "text_encoder": CLIP_L, "text_encoder_2": CLIP_G, "vae": 0.0837},
    "sdxl-controlnet-ip": {
        "unet": 2.567 + 0.35,  # with the adapter's projections
        "controlnet": 1.251,
        "image_encoder": 0.632,
    },
    "sd35": {"transformer": 8.06, "text_encoder_2": CLIP_G, "text_encoder_3": T5_XXL},
    "flux": {"transformer": 11.9, "text_encoder": CLIP_L, "text_encoder_2": T5_XXL},
    "flux-loras": {"transformer": 11.9, "text_encoder_2": T5_XXL},
    "wan22": {"transformer": 14.29, "transformer_2": 14.29, "text_encoder": UMT5_XXL, "vae": 0.127},
    "hunyuanvideo": {"transformer": 12.8, "text_encoder": 7.5, "text_encoder_2": CLIP_L},
    "qwen": {"transformer": 20.4, "text_encoder": 8.29, "vae": 0.127},
    "ltx": {"transformer": 1.92, "text_encoder": T5_XXL, "vae": 0.419},
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_full_recipe_has_as_many_parameters_as_published(name: str, tmp_path: Path) -> None:
    pipe = RECIPES[name](Source(True, torch.device("meta"), tmp_path)).pipe
    for part, billions in PUBLISHED[name].items():
        parameters = list(getattr(pipe, part).parameters())
        assert all(parameter.is_meta for parameter in parameters)
        assert sum(p.numel() for p in parameters) == pytest.approx(billions * 1e9, rel=0.02), part


@pytest.mark.parametrize("name", RECIPES)
def test_a_tiny_recipe_streams_and_draws_what_the_unswapped_pipeline_draws(name: str) -> None:
    with torch.no_grad():
        row = pipelines.run_recipe(name, "tiny", "cpu")
    assert row["status"] == "ok"
    assert row["bit_identical"] is True
    assert row["denoiser_streamed_share"] >= 0.5
    assert row["drawn_std"] > 0.05
    assert all(row["runs"].values()), "a component did not run"
    assert len(row["calls_s"]) == len(row["flushes"]) == len(row["ooms"]) == 6
    assert all(seconds > 0 for seconds in row["phases_s"].values())
    assert row["swapped_phases_s"].keys() == row["phases_s"].keys()
    assert 0 < sum(row["swapped_phases_s"].values()) < 10 * row["call_s"]
    if name == "qwen":  # as in full size, whole it would leave too little of the cap
        assert "text_encoder" in row["streamed_bytes"]
    steps = row["settings"]["call"]["num_inference_steps"]
    if name == "wan22":  # each step computes with guidance, and belongs to one expert
        assert row["runs"]["transformer"] + row["runs"]["transformer_2"] == 2 * steps


def test_watching_an_attached_pipeline_leaves_it_attached(tmp_path: Path) -> None:
    with torch.no_grad():
        recipe = pipelines.build("flux", "tiny", "cpu")
        expected, _ = pipelines.draw_once(recipe)
        names = "transformer", "vae", "text_encoder_2"
        modules = [getattr(recipe.pipe, name) for name in names]
        with blockswap.attach(recipe.pipe, device="cpu", offload="300KiB") as session:
            pipelines.draw_once(recipe)
            before = [dict(vars(module)) for module in modules]
            with pipelines.watched(recipe.pipe, "seconds") as parts:
                assert torch.equal(pipelines.draw_once(recipe)[0], expected)
            assert [vars(module).keys() for module in modules] == [b.keys() for b in before]
            for module, was in zip(modules, before, strict=True):
                for call in "forward", "encode", "decode":
                    assert vars(module).get(call) is was.get(call)
            turns = session.report().guests["vae"].turns
            assert torch.equal(pipelines.draw_once(recipe)[0], expected)
            assert session.report().guests["vae"].turns == turns + 1
        assert [parts[name].runs for name in names] == [4, 1, 1]


def test_a_recipe_that_fails_leaves_the_rows_of_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(source: Source) -> Any:
        raise ValueError("no such class")

    monkeypatch.setitem(pipelines.RECIPES, "flux", broken)
    out = tmp_path / "rows.json"
    command = ["pipelines.py", "--models", "flux,qwen", "--size", "tiny", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", [*command, "--out", str(out)])
    with pytest.raises(SystemExit) as ended:
        pipelines.main()
    assert ended.value.code == 1
    failed, fine = json.loads(out.read_text())["rows"]
    assert failed == {"model": "flux", "status": "error: ValueError: no such class"}
    assert (fine["model"], fine["status"]) == ("qwen", "ok")


def part(weights: int, runs: int, seconds: float, first: int, last: int, activations: int) -> Part:
    return Part(weights, runs, seconds, first, last, activations, activations)


def test_the_least_that_a_call_takes_is_compute_or_bytes_of_each_phase() -> None:
    parts = {
        "text_encoder": part(10 * GB, 1, 0.05, 0, 0, 0),
        "transformer": part(15 * GB, 10, 1.0, 1, 10, 5 * GB),
        "vae": part(GB, 1, 0.3, 11, 11, 2 * GB),
    }
    # Under 10 GB: 10 GB once; 15 GB once, of which 10 GB find no room in 9 further steps; compute.
    assert floor_seconds(parts, 10 * GB, 50 * GB) == pytest.approx(0.2 + 2.1 + 0.3)
    # 10 GB in each of 10 steps, if the other 5 are there from the last call.
    staying = floor_seconds(parts, 10 * GB, 50 * GB, ["transformer"])
    assert staying == pytest.approx(0.2 + 2.0 + 0.3)
    parts["transformer"].seconds = 4.0
    assert floor_seconds(parts, 10 * GB, 50 * GB) == pytest.approx(0.2 + 4.0 + 0.3)


def test_components_whose_calls_alternate_share_a_phase_and_the_cap() -> None:
    controlnet, unet = part(2 * GB, 4, 0.1, 1, 7, GB), part(5 * GB, 4, 0.2, 2, 8, GB)
    text, idle = part(GB, 1, 0.1, 0, 0, 0), part(GB, 0, 0.0, 0, 0, 0)
    found = phases_of({"unet": unet, "idle": idle, "text": text, "controlnet": controlnet})
    assert [phase.parts for phase in found] == [[text], [controlnet, unet]]
    # 7 GB and activations of 1 GB under 5 GB: 3 GB come again in each of 3 further steps.
    assert found[1].least_bytes(5 * GB) == 7 * GB + 3 * 3 * GB


def test_experts_that_run_one_after_the_other_each_have_the_cap() -> None:
    high, low = part(4 * GB, 2, 0.1, 0, 1, 0), part(4 * GB, 3, 0.1, 2, 4, 0)
    assert phases_of({"high": high, "low": low}) == [Phase([high]), Phase([low])]


class Blocks(nn.Module):
    """Four blocks of one leaf that streams and one too small for it, and weights outside."""

    def __init__(self) -> None:
        super().__init__()
        self.outside = nn.Linear(64, 64, bias=False)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(256, 256, bias=False), nn.LayerNorm(256)) for _ in range(4)
        )


def test_weights_that_never_stream_count_in_what_a_model_needs_at_its_least() -> None:
    leaf, norm, outside = 4 * 256 * 256, 4 * 2 * 256, 4 * 64 * 64
    assert least_bytes(Blocks(), include_outside=False) == leaf + 4 * norm + outside


def test_the_cap_is_30_percent_or_what_the_neediest_component_needs() -> None:
    transformer, vae = Blocks(), nn.Linear(1024, 1024, bias=False)
    pipe = SimpleNamespace(components={"transformer": transformer, "vae": vae})
    weights = sum(p.nbytes for p in transformer.parameters())
    parts = {"transformer": Part(weights), "vae": Part(4 * 2**20)}
    cap = cap_for(pipe, parts)
    assert cap - cap_margin_bytes(cap) == pytest.approx(4 * 2**20, abs=64)  # the VAE, whole
    parts["transformer"].reserved_bytes = 10 * 2**20
    cap = cap_for(pipe, parts)
    assert cap - cap_margin_bytes(cap) == pytest.approx(
        10 * 2**20 + least_bytes(transformer, include_outside=False), abs=64
    )
    parts["vae"].weight_bytes, parts["transformer"].weight_bytes = 4 * 2**20, 100 * 2**20
    cap = cap_for(pipe, parts)
    assert cap - cap_margin_bytes(cap) == pytest.approx(0.3 * 104 * 2**20, abs=64)


def test_a_row_says_what_it_misses() -> None:
    row = {
        "bit_identical": False,
        "drawn_std": 0.2,
        "cap_bytes": 10,
        "peak_device_bytes": 12,
        "denoiser_streamed_share": 0.4,
    }
    assert pipelines.verdict(row) == (
        "missed: another image than unswapped; the peak is 2 bytes over the cap;"
        " only 40% of a denoiser streams"
    )
    kept = {"bit_identical": True, "peak_device_bytes": 10, "denoiser_streamed_share": 0.5}
    assert pipelines.verdict(row | kept) == "ok"


def test_a_word_tokenizer_counts_words_and_marks_and_knows_those_of_its_text() -> None:
    template = "<|im_start|>system\nDescribe the image:<|im_end|>\n{}"
    before = template[: template.index("{}")]
    tokenizer = word_tokenizer(template + "a red fox", num_tokens=64)
    ids = tokenizer(before + "a red fox, a wolf").input_ids
    assert len(ids) == num_words(before) + 6
    assert ids.count(tokenizer.unk_token_id) == 2  # the comma and the wolf
    with pytest.raises(ValueError, match="words"):
        word_tokenizer(template, num_tokens=4)
