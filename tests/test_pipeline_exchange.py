"""What is given to an attached pipeline in place of a component is attached as that was."""

from __future__ import annotations

import copy
import gc
import json
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, FluxImg2ImgPipeline
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


def test_refused_component_leaves_what_is_saved_as_it_was(flux: Pair, tmp_path: Path) -> None:
    before = dict(flux.pipe.config)
    tiny = AutoencoderTiny()
    tiny._hf_hook = object()
    with pytest.raises(ConfigError):
        flux.pipe.transformer = None
    for given in ({"vae": tiny}, {"transformer": None}):
        with pytest.raises(ConfigError):
            flux.pipe.register_modules(**given)
    assert dict(flux.pipe.config) == before
    flux.pipe.save_pretrained(tmp_path / "saved")
    index = json.loads((tmp_path / "saved" / "model_index.json").read_text())
    assert index["transformer"] == ["diffusers", "FluxTransformer2DModel"]


def test_one_refused_of_several_components_leaves_all_of_them(flux: Pair) -> None:
    plain, before, parts = flux.draw(output_type="np"), flux.pipe.config, flux.pipe.components
    refused = copy.deepcopy(flux.right.text_encoder)
    refused._hf_hook = object()
    with pytest.raises(ConfigError, match=r"pipe\.text_encoder"):
        flux.pipe.register_modules(vae=AutoencoderTiny(), text_encoder=refused)
    assert flux.pipe.components == parts
    assert dict(flux.pipe.config) == dict(before)
    assert np.array_equal(flux.draw(output_type="np"), plain)


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("when", ["running", "paused"])
def test_deleted_component_leaves_the_session_and_memory(
    streams: bool, when: str, tmp_path: Path
) -> None:
    pipe, call = make("flux", tmp_path)
    with torch.no_grad():
        embeds = pipe.encode_prompt("a red fox", None)[:2]
    given = {"prompt": None, "height": 64, "width": 64, "output_type": "latent"}
    call |= given | dict(zip(("prompt_embeds", "pooled_prompt_embeds"), embeds, strict=True))
    expected = draw(pipe, call)
    if streams:
        with_large_encoder(pipe)
    with blockswap.attach(pipe, device="cpu", vram="16MiB", offload="1GB") as session:
        assert ("text_encoder_2" in session.sessions) == streams
        draw(pipe, call)
        gone = [weakref.ref(t) for t in (pipe.text_encoder_2, *pipe.text_encoder_2.parameters())]
        if when == "paused":
            session.pause()
        del pipe.text_encoder_2
        if when == "paused":
            session.resume()
        gc.collect()
        assert not any(ref() is not None for ref in gone)
        assert "text_encoder_2" not in {**session.sessions, **session.report().guests}
        assert np.array_equal(draw(pipe, call), expected)


def test_deleted_denoiser_is_refused_as_none_in_its_place_is(flux: Pair) -> None:
    plain, old = flux.draw(), flux.pipe.transformer
    with pytest.raises(ConfigError) as none:
        flux.pipe.transformer = None
    with pytest.raises(ConfigError) as deleted:
        del flux.pipe.transformer
    assert str(deleted.value) == str(none.value)
    assert flux.pipe.transformer is old
    assert np.array_equal(flux.draw(), plain)


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
