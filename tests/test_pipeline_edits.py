"""What users do to an attached pipeline, between calls or steps, does what it does without us."""

from __future__ import annotations

import copy
import pickle
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pipeline_pair import Edit, Pair, loading, lora
from pipelines import denoiser_of, draw

import blockswap
from blockswap.errors import UseError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def flux(tmp_path: Path) -> Pair:
    return Pair("flux", tmp_path, "all")


@pytest.fixture
def sdxl(tmp_path: Path) -> Pair:
    return Pair("sdxl", tmp_path, "half")


def two_adapters(kind: str, folder: Path) -> list[Edit]:
    return [
        *(loading(lora(kind, seed, folder), name) for seed, name in ((1, "one"), (2, "two"))),
        lambda pipe: pipe.set_adapters(["one", "two"], [0.7, -0.4]),
        lambda pipe: pipe.fuse_lora(adapter_names=["one", "two"]),
        lambda pipe: pipe.unfuse_lora(),
        lambda pipe: pipe.disable_lora(),
        lambda pipe: pipe.enable_lora(),
        lambda pipe: pipe.delete_adapters("one"),
        lambda pipe: pipe.fuse_lora(lora_scale=0.5),
        lambda pipe: pipe.unload_lora_weights(),
    ]


def dora(kind: str, folder: Path) -> list[Edit]:
    return [
        loading(lora(kind, 3, folder, use_dora=True), "dora"),
        lambda pipe: pipe.fuse_lora(),
        lambda pipe: pipe.unfuse_lora(),
        lambda pipe: pipe.unload_lora_weights(),
    ]


class Doubled:
    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self.processor(*args, **kwargs)
        return (2 * output[0], *output[1:]) if isinstance(output, tuple) else 2 * output


def double(pipe: Any) -> None:
    model = denoiser_of(pipe)
    model.set_attn_processor({n: Doubled(p) for n, p in model.attn_processors.items()})


def attention(kind: str, folder: Path) -> list[Edit]:
    return [
        lambda pipe: denoiser_of(pipe).fuse_qkv_projections(),
        lambda pipe: denoiser_of(pipe).unfuse_qkv_projections(),
        lambda pipe: denoiser_of(pipe).set_attention_backend("_native_math"),
        lambda pipe: denoiser_of(pipe).reset_attention_backend(),
        double,
    ]


def scale(pipe: Any) -> None:
    for parameter in denoiser_of(pipe).parameters():
        parameter.data.mul_(1.05)


def weights(*_: Any) -> list[Edit]:
    return [scale, scale]


CASES = [("flux", e, o) for e in (two_adapters, dora, attention, weights) for o in ("half", "all")]
CASES += [("sdxl", two_adapters, "half"), ("sdxl", attention, "all")]
CASES += [("sd3", two_adapters, "all")]
IDS = [f"{kind}-{edits.__name__}-{offload}" for kind, edits, offload in CASES]


@pytest.mark.parametrize(("kind", "edits", "offload"), CASES, ids=IDS)
@pytest.mark.parametrize("when", ["between calls", "between steps"])
def test_edit_draws_what_it_draws_on_an_unswapped_pipeline(
    kind: str, edits: Any, offload: str, when: str, tmp_path: Path
) -> None:
    both = Pair(kind, tmp_path, offload)
    todo = edits(kind, tmp_path)
    steps = 2 if when == "between calls" else len(todo) + 1
    plain = both.draw(steps)
    edited = [both.draw_while(todo)] if when == "between steps" else []
    edited = edited or [both.edit(each) or both.draw() for each in todo]
    assert any(not np.array_equal(each, plain) for each in edited), "the edits change nothing"
    both.session.detach()
    both.draw()


def test_nothing_of_an_adapter_or_of_ours_is_left_on_a_detached_pipeline(flux: Pair) -> None:
    flux.edit(loading(lora("flux", 1, flux.folder), "one"))
    flux.draw()
    flux.session.detach()
    left = [n for n, m in flux.pipe.transformer.named_modules() if "forward" in vars(m)]
    assert left == []
    flux.draw()


def test_textual_inversion_is_used_by_the_next_call(sdxl: Pair) -> None:
    plain = sdxl.draw(prompt="a red <thing>")
    vector = torch.randn(1, 64, generator=torch.Generator().manual_seed(3))
    sdxl.edit(lambda p: p.load_textual_inversion(vector, token="<thing>"))
    assert not np.array_equal(sdxl.draw(prompt="a red <thing>"), plain)


def test_another_scheduler_is_used_and_freeing_memory_in_a_step_does_no_harm(sdxl: Pair) -> None:
    from diffusers import DDIMScheduler as Other

    plain = sdxl.draw(callback_on_step_end=lambda p, *_: p.maybe_free_model_hooks() or {})
    sdxl.edit(lambda p: setattr(p, "scheduler", Other.from_config(p.scheduler.config)))
    assert not np.array_equal(sdxl.draw(), plain)


@pytest.mark.parametrize("shard", ["1GB", "1MB"])
def test_saved_denoiser_has_the_weights_of_the_last_edit(flux: Pair, shard: str) -> None:
    flux.edit(scale)
    folder = flux.folder / "saved"
    flux.pipe.transformer.save_pretrained(folder, max_shard_size=shard)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (shard == "1MB")
    loaded = type(flux.right.transformer).from_pretrained(folder).state_dict()
    expected = flux.right.transformer.state_dict()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    flux.draw()


@pytest.mark.parametrize("way", ["other names", "other shapes"])
def test_adapter_of_another_model_fails_as_ever_and_harms_nothing(flux: Pair, way: str) -> None:
    plain, good = flux.draw(), lora("flux", 1, flux.folder)
    bad = {n.replace(".attn.", ".nothing."): v for n, v in good.items()}
    if way == "other shapes":
        bad = {n: torch.ones(v.shape[0] + 4 * ("_B" in n), v.shape[1]) for n, v in good.items()}
    for pipe in (flux.right, flux.pipe):
        refused = pytest.raises(RuntimeError, match="size mismatch")
        with refused if way == "other shapes" else nullcontext():
            pipe.load_lora_weights(dict(bad), adapter_name="bad")
    flux.draw()
    flux.edit(lambda pipe: pipe.unload_lora_weights())
    assert np.array_equal(flux.draw(), plain)


@pytest.mark.parametrize("edit", ["load", "unload"])
def test_edit_during_a_forward_is_refused_or_right(flux: Pair, edit: str) -> None:
    acts = {"load": loading(lora("flux", 1, flux.folder), "one")}
    acts |= {"unload": lambda p: p.unload_lora_weights()}
    if edit == "unload":
        flux.edit(acts["load"])
    pictures = []
    for pipe in (flux.right, flux.pipe):
        todo = [acts[edit]]
        block = pipe.transformer.transformer_blocks[1]
        with block.register_forward_hook(lambda *_, p=pipe, t=todo: t.pop()(p) if t else None):
            try:
                pictures.append(draw(pipe, flux.call, 2))
            except UseError as error:
                assert "changed during a forward" in str(error)  # noqa: PT017
                return
    assert np.array_equal(*pictures)
    flux.draw()


@pytest.mark.parametrize("act", [copy.deepcopy, pickle.dumps])
def test_copying_an_attached_pipeline_is_refused(flux: Pair, act: Edit) -> None:
    with pytest.raises(UseError, match=r"session\.pause\(\)"):
        act(flux.pipe)
    flux.draw()


def test_copy_of_a_vae_is_refused_or_a_model_of_its_own(flux: Pair) -> None:
    latents = torch.ones(1, 16, 8, 8)
    try:
        other = copy.deepcopy(flux.pipe.vae)
    except UseError:
        return
    own = copy.deepcopy(flux.right.vae)
    with torch.no_grad():
        for each in (other, own):
            each.decoder.conv_out.weight.mul_(2.0)
        assert torch.equal(other.decode(latents)[0], own.decode(latents)[0])


def test_model_shared_by_two_pipelines_has_one_cap_and_may_be_exchanged(flux: Pair) -> None:
    other = type(flux.pipe).from_pipe(flux.pipe)
    with pytest.raises(UseError, match=r"attached with other settings \(vram"):
        blockswap.attach(other, device="cpu", vram="1GiB", offload="1GB")
    flux.draw()
    model = flux.right.transformer
    small = type(model).from_config({**model.config, "num_layers": 2})
    flux.edit(lambda pipe: setattr(pipe, "transformer", copy.deepcopy(small).eval()))
    flux.draw()
