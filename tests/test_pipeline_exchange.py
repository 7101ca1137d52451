"""What is given to an attached pipeline in place of a component is attached as that was."""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxImg2ImgPipeline
from pipeline_pair import Edit, Pair
from pipelines import denoiser_of, draw, make, noise, with_large_encoder
from test_pipeline import tree
from test_pipeline_parts import from_file, save_encoder

import blockswap
from blockswap.errors import ConfigError, UseError

IMAGE = np.random.default_rng(3).integers(0, 256, (64, 64, 3), dtype=np.uint8)
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def flux(tmp_path: Path) -> Pair:
    return Pair("flux", tmp_path, "half")


def other_vae(pipe: Any) -> Any:
    """Return a VAE like the pipeline's, with other weights."""
    vae = type(pipe.vae).from_config(pipe.vae.config).eval()
    generator = torch.Generator().manual_seed(9)
    for parameter in vae.parameters():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return vae


def other_denoiser(pipe: Any, **config: Any) -> Any:
    model = denoiser_of(pipe)
    torch.manual_seed(9)
    return type(model).from_config({**model.config, **config}).eval()


def giving(name: str, component: Any) -> Edit:
    """Give each pipeline its own copy."""
    return lambda pipe: setattr(pipe, name, copy.deepcopy(component))


@pytest.mark.parametrize("kind", ["sdxl", "flux"])
def test_image_encoder_of_an_ip_adapter_is_a_component_like_the_others(
    kind: str, tmp_path: Path
) -> None:
    both = Pair(kind, tmp_path, "half")
    save_encoder(tmp_path / "image_encoder")
    plain = both.draw()
    given = {"ip_adapter_image": [IMAGE]}
    both.edit(from_file(both, encoder=True))
    encoder = both.pipe.image_encoder
    assert not np.array_equal(both.draw(**given), plain)
    assert both.session.report().guests["image_encoder"].turns > 0
    assert "pipe.image_encoder: " in str(both.session.report())
    before = both.pipe.image_encoder.state_dict()
    assert all(torch.equal(v, before[n]) for n, v in both.right.image_encoder.state_dict().items())
    both.edit(lambda pipe: pipe.unload_ip_adapter())
    assert "image_encoder" not in both.session.report().guests
    assert np.array_equal(both.draw(), plain)
    both.edit(from_file(both, encoder=True))
    both.draw(**given)
    gone, encoder = weakref.ref(encoder), None
    gc.collect()
    assert gone() is None
    both.session.detach()
    both.draw(**given)
    assert tree(both.pipe).keys() == tree(both.right).keys()


@pytest.mark.parametrize("way", ["attribute", "register_modules"])
@pytest.mark.parametrize("when", ["between calls", "between steps", "paused"])
def test_another_vae_decodes_and_neither_keeps_a_trace(way: str, when: str, flux: Pair) -> None:
    other, old = other_vae(flux.right), flux.pipe.vae
    plain = flux.draw(output_type="np")
    give = giving("vae", other)
    if way == "register_modules":
        give = lambda pipe: pipe.register_modules(vae=copy.deepcopy(other))  # noqa: E731
    if when == "between steps":
        changed = flux.draw_while([give], output_type="np")
    else:
        if when == "paused":
            flux.session.pause()
        flux.edit(give)
        if when == "paused":
            flux.session.resume()
        changed = flux.draw(output_type="np")
    assert not np.array_equal(changed, plain)
    assert flux.session.report().guests["vae"].turns == 1
    assert sorted(vars(old)) == sorted(vars(other))
    assert copy.deepcopy(old) is not old  # what is attached refuses it
    with pytest.raises(UseError, match=r"session\.pause\(\)"):
        copy.deepcopy(flux.pipe.vae)
    given = flux.pipe.vae
    flux.session.detach()
    assert sorted(vars(given)) == sorted(vars(other))
    flux.draw(output_type="np")


@pytest.mark.parametrize(("kind", "offload"), [("flux", "all"), ("sdxl", "half"), ("wan", "all")])
@pytest.mark.parametrize("when", ["between calls", "between steps"])
def test_another_denoiser_streams(kind: str, offload: str, when: str, tmp_path: Path) -> None:
    both = Pair(kind, tmp_path, offload)
    (name, old), *_ = both.session.sessions.items()
    models = [denoiser_of(pipe) for pipe in (both.pipe, both.right)]
    before = both.draw()
    weights = {n: v.clone() for n, v in old.model.state_dict().items()}
    other = other_denoiser(both.right)
    give = giving(name, other)
    if when == "between steps":
        both.draw_while([give], steps=3)
    else:
        both.edit(give)
        assert not np.array_equal(both.draw(), before)
    new = both.session.sessions[name]
    assert new.model is denoiser_of(both.pipe)
    assert (old.state, new.state) == ("detached", "learning")
    both.settle()
    both.draw()
    assert both.session.report().parts[name].streamed_bytes > 0
    assert sorted(vars(models[0])) == sorted(vars(other))
    assert all(torch.equal(v, weights[n]) for n, v in models[0].state_dict().items())
    both.edit(lambda pipe: setattr(pipe, name, models.pop(0)))
    assert np.array_equal(both.draw(), before)
    both.session.detach()
    assert np.array_equal(both.draw(), before)


def test_larger_text_encoder_streams_and_a_small_one_comes_whole_again(tmp_path: Path) -> None:
    (pipe, call), (right, _) = make("flux", tmp_path), make("flux", tmp_path)
    call |= {"height": 64, "width": 64, "output_type": "latent"}
    small = pipe.text_encoder_2
    with blockswap.attach(pipe, device="cpu", vram="16MiB", offload="1GB") as session:
        for each in (right, pipe):
            with_large_encoder(each)
        expected = draw(right, call)
        for _ in range(3):
            assert np.array_equal(draw(pipe, call), expected)
        assert session.report().parts["text_encoder_2"].streamed_bytes > 0
        visitor = session.sessions["text_encoder_2"]
        pipe.text_encoder_2 = small
        assert visitor.state == "detached"
        draw(pipe, call)
        assert session.report().guests["text_encoder_2"].turns == 1


def test_refused_component_leaves_the_pipeline_as_it_was(flux: Pair) -> None:
    plain, old = flux.draw(output_type="np"), flux.pipe.transformer
    offloaded = other_vae(flux.right)
    offloaded._hf_hook = object()
    for name, given in (
        ("vae", offloaded),
        ("transformer", other_denoiser(flux.right).to("meta")),
        ("transformer", None),
    ):
        with pytest.raises(ConfigError):
            setattr(flux.pipe, name, given)
        assert flux.pipe.components[name] is not given
    assert flux.pipe.transformer is old
    assert flux.session.sessions["transformer"].model is old
    assert np.array_equal(flux.draw(output_type="np"), plain)
    flux.settle()
    assert flux.session.report().parts["transformer"].streamed_bytes > 0


def test_exchange_in_a_forward_is_refused(flux: Pair) -> None:
    plain, vae = flux.draw(), flux.pipe.vae
    block = flux.pipe.transformer.transformer_blocks[1]
    with (
        block.register_forward_hook(lambda *_: setattr(flux.pipe, "vae", other_vae(flux.right))),
        pytest.raises(UseError, match="a forward runs"),
    ):
        draw(flux.pipe, flux.call)
    assert flux.pipe.vae is vae
    assert np.array_equal(flux.draw(), plain)


def test_exchange_in_one_of_two_pipelines_leaves_the_other_one(flux: Pair) -> None:
    ours, theirs = (FluxImg2ImgPipeline.from_pipe(pipe) for pipe in (flux.pipe, flux.right))
    call = flux.call | {"image": noise(1, 3, 64, 64).clamp(-1, 1), "strength": 0.9}
    call |= {"output_type": "np"}
    expected = draw(theirs, call)
    with blockswap.attach(ours, config=flux.session.config) as session:
        vae, transformer = flux.pipe.vae, flux.pipe.transformer
        flux.edit(giving("vae", other_vae(flux.right)))
        assert "decode" in vars(vae), "it computes under the cap"
        flux.edit(giving("transformer", other_denoiser(flux.right)))
        flux.draw(output_type="np")
        assert np.array_equal(draw(ours, call), expected)
        assert (ours.vae, ours.transformer) == (vae, transformer)
        shared = session.sessions["transformer"]
        assert shared.model is transformer
        assert shared.state != "detached"
        turns = session.report().guests["vae"].turns
        flux.session.detach()
        assert np.array_equal(draw(ours, call), expected)
        assert session.report().guests["vae"].turns == turns + 2
    assert "decode" not in vars(vae)


def test_one_more_denoiser_under_a_cap_is_refused_with_the_way_out(tmp_path: Path) -> None:
    pipe, call = make("wan", tmp_path)
    more = copy.deepcopy(pipe.transformer)
    with blockswap.attach(pipe, device="cpu", vram="1GiB", offload=1):
        with pytest.raises(UseError, match=r"pipe\.transformer_2 would share the cap.*detach\(\)"):
            pipe.transformer_2 = more
        assert pipe.transformer_2 is None
        draw(pipe, call | {"height": 64, "width": 64})
    with blockswap.attach(pipe, device="cpu", offload=1) as session:
        pipe.transformer_2 = more
        assert list(session.sessions) == ["transformer", "transformer_2"]
        assert session.sessions["transformer_2"].state == "learning"


def test_what_is_no_component_is_nothing_to_the_session(flux: Pair) -> None:
    plain, parts = flux.draw(), dict(flux.session.sessions)
    session = parts["transformer"]
    flux.edit(lambda pipe: setattr(pipe, "mine", torch.nn.Linear(4, 4)))
    flux.edit(lambda pipe: setattr(pipe, "numbers", torch.ones(3)))
    assert sorted(vars(flux.pipe.mine)) == sorted(vars(flux.right.mine))
    assert flux.session.sessions == parts
    assert session.state == "ready"
    assert np.array_equal(flux.draw(), plain)
