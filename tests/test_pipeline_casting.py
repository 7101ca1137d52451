"""Layerwise casting: weights stream as they are stored, and compute as without us."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.hooks import apply_layerwise_casting
from pipeline_pair import Pair, loading, lora
from pipelines import denoiser_of

import blockswap
from blockswap.errors import UnsupportedError

FP8, COMPUTED = torch.float8_e4m3fn, torch.float32
pytestmark = pytest.mark.usefixtures("one_thread")


def cast(pipe: Any) -> None:
    denoiser_of(pipe).enable_layerwise_casting(FP8)


def cast_as_a_whole(pipe: Any) -> None:
    apply_layerwise_casting(pipe.transformer, FP8, COMPUTED, skip_modules_pattern=None)


def bits_of(model: Any) -> dict[str, torch.Tensor]:
    return {n: v.contiguous().view(torch.uint8) for n, v in model.state_dict().items()}


def assert_same_bits(both: Pair) -> None:
    ours, theirs = (bits_of(denoiser_of(pipe)) for pipe in (both.pipe, both.right))
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def streamed_bytes(both: Pair) -> int:
    return int(next(iter(both.session.report().parts.values())).streamed_bytes)


@pytest.fixture
def flux(tmp_path: Path) -> Pair:
    return Pair("flux", tmp_path, "half", cast)


@pytest.mark.parametrize(("kind", "offload"), [("flux", "half"), ("sdxl", "all"), ("wan", "all")])
@pytest.mark.parametrize("when", ["before attach", "between calls", "between steps"])
def test_casting_draws_what_it_draws_on_an_unswapped_pipeline(
    kind: str, offload: str, when: str, tmp_path: Path
) -> None:
    both = Pair(kind, tmp_path, offload, cast if when == "before attach" else lambda _: None)
    plain, streamed = both.draw(), streamed_bytes(both)
    if when != "before attach":
        if when == "between steps":
            both.draw_while([cast], steps=3)
        else:
            both.edit(cast)
        assert not np.array_equal(both.draw(), plain)
        both.settle()
        assert offload == "half" or streamed_bytes(both) < streamed / 2
    both.draw()
    assert_same_bits(both)
    both.session.detach()
    both.draw()
    assert_same_bits(both)


def test_cast_model_is_used_with_the_adapters_that_it_had(tmp_path: Path) -> None:
    both = Pair("flux", tmp_path, "half")
    both.edit(loading(lora("flux", 1, tmp_path), "one"))
    plain = both.draw()
    both.edit(cast)
    adapted = both.draw()
    assert not np.array_equal(adapted, plain)
    both.edit(lambda pipe: pipe.set_adapters(["one"], [0.5]))
    assert not np.array_equal(both.draw(), adapted)
    both.edit(lambda pipe: pipe.unload_lora_weights())
    both.draw_while([lambda _: None])


def test_weight_put_there_in_another_dtype_is_stored_after_its_first_use(flux: Pair) -> None:
    plain = flux.draw(3)

    def replace(pipe: Any) -> None:
        for block in pipe.transformer.transformer_blocks:
            weight = block.attn.to_q.weight
            weight.data = weight.data.to(COMPUTED) * 1.03

    flux.edit(replace)
    assert not np.array_equal(flux.draw(3), plain)
    assert_same_bits(flux)
    flux.draw(3)


@pytest.mark.parametrize("name", ["to_q", "norm_q"])
def test_module_that_fails_keeps_its_stored_weights(flux: Pair, name: str) -> None:
    plain = flux.draw()
    leaf = getattr(flux.pipe.transformer.transformer_blocks[0].attn, name)
    before = leaf.weight.clone().view(torch.uint8)
    with torch.no_grad(), pytest.raises(RuntimeError):
        leaf(torch.ones(1, 3))
    assert torch.equal(leaf.weight.view(torch.uint8), before)
    assert np.array_equal(flux.draw(), plain)


def test_casting_that_changes_no_stored_weight_is_noticed(tmp_path: Path) -> None:
    both = Pair("flux", tmp_path, "half")
    plain = both.draw()
    # Stored as they are, computed with less: no weight changes when this is switched on.
    both.edit(
        lambda pipe: apply_layerwise_casting(
            pipe.transformer.transformer_blocks[1].ff, COMPUTED, torch.bfloat16, None, (Skipped,)
        )
    )
    for pipe in (both.pipe, both.right):
        pipe.transformer.transformer_blocks[1].ff.register_forward_pre_hook(
            lambda _, args: (args[0].bfloat16(),)
        )
    assert not np.array_equal(both.draw(), plain)


class Skipped(torch.nn.Module):
    """No module of the model."""


@pytest.mark.parametrize("shard", ["1GB", "1MB"])
def test_saved_denoiser_is_stored_as_it_was_cast(flux: Pair, shard: str) -> None:
    from safetensors.torch import load_file

    saved = []
    for name, pipe in (("ours", flux.pipe), ("theirs", flux.right)):
        pipe.transformer.save_pretrained(flux.folder / name, max_shard_size=shard)
        files = sorted((flux.folder / name).glob("*.safetensors"))
        assert (len(files) > 1) == (shard == "1MB")
        saved.append({n: v.view(torch.uint8) for f in files for n, v in load_file(f).items()})
    assert saved[0].keys() == saved[1].keys()
    assert all(torch.equal(saved[0][n], saved[1][n]) for n in saved[0])
    flux.draw()


def test_casting_of_a_vae_is_kept(tmp_path: Path) -> None:
    both = Pair("flux", tmp_path, "half")
    plain = both.draw(output_type="np")
    both.edit(lambda pipe: pipe.vae.enable_layerwise_casting(FP8))
    edited = both.draw(output_type="np")
    assert not np.array_equal(edited, plain)
    assert np.array_equal(both.draw(output_type="np"), edited)
    both.session.detach()
    both.draw(output_type="np")


def test_casting_of_a_model_as_a_whole_is_refused_before_and_after_attach(tmp_path: Path) -> None:
    both = Pair("flux", tmp_path, "half")
    both.edit(cast_as_a_whole)
    for _ in range(2):
        with pytest.raises(UnsupportedError, match=r"as a whole.*model\.enable_layerwise_casting"):
            both.draw()
    both.session.detach()
    both.draw()
    with pytest.raises(UnsupportedError, match="layerwise casting of the model as a whole"):
        blockswap.attach(both.pipe, device="cpu", offload="1GB")
