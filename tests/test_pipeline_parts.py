"""IP-Adapters, other dtypes, pipelines made of an attached one: all draws as without us."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxImg2ImgPipeline
from pipeline_pair import Edit, Pair
from pipelines import draw, noise
from safetensors.torch import save_file

import blockswap

EMBEDDED = 32  # an image, by its encoder
FLUX_EMBEDS = {  # without the negative one diffusers wants an image encoder
    "ip_adapter_image_embeds": [noise(1, 1, EMBEDDED)],
    "negative_ip_adapter_image_embeds": [noise(1, 1, EMBEDDED)],
}
pytestmark = pytest.mark.usefixtures("one_thread")


def adapter_of(unet: Any, seed: int) -> dict[str, dict[str, torch.Tensor]]:
    """Return the random weights of an IP-Adapter that fits a UNet."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    width = unet.config.cross_attention_dim
    image_proj = {"proj.weight": 0.2 * random(4 * width, EMBEDDED), "proj.bias": random(4 * width)}
    image_proj |= {"norm.weight": 1 + 0.1 * random(width), "norm.bias": 0.1 * random(width)}
    attentions = [n.removesuffix(".processor") for n in unet.attn_processors if "attn2" in n]
    ip_adapter = {
        f"{2 * number + 1}.to_{each}_ip.weight": 0.2 * random(*layer.weight.shape)
        for number, name in enumerate(attentions)
        for each in "kv"
        for layer in [unet.get_submodule(f"{name}.to_{each}")]
    }
    return {"image_proj": image_proj, "ip_adapter": ip_adapter}


def flux_adapter_of(transformer: Any, seed: int) -> dict[str, dict[str, torch.Tensor]]:
    """Return the random weights of an IP-Adapter that fits FLUX."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    width, inner = transformer.config.joint_attention_dim, transformer.inner_dim
    image_proj = {"proj.weight": 0.2 * random(4 * width, EMBEDDED), "proj.bias": random(4 * width)}
    image_proj |= {"norm.weight": 1 + 0.1 * random(width), "norm.bias": 0.1 * random(width)}
    ip_adapter = {
        f"{number}.to_{each}_ip.{part}": 0.2 * random(*shape)
        for number in range(transformer.config.num_layers)
        for each in "kv"
        for part, shape in (("weight", (inner, width)), ("bias", (inner,)))
    }
    return {"image_proj": image_proj, "ip_adapter": ip_adapter}


def save_encoder(folder: Path) -> None:
    """Save a small image encoder with random weights."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(7)
    config = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
        projection_dim=EMBEDDED,
    )
    CLIPVisionModelWithProjection(config).save_pretrained(folder)


def from_file(both: Pair, seed: int = 1, encoder: bool = False) -> Edit:
    """Load an IP-Adapter from a file, with the image encoder of the pair's folder or none."""
    given = {"subfolder": "", "weight_name": f"ip{seed}.safetensors"}
    if both.kind == "flux":
        parts = flux_adapter_of(both.right.transformer, seed)
        folder = str(both.folder / "image_encoder") if encoder else None
        given |= {"image_encoder_pretrained_model_name_or_path": folder}
        given |= {"image_encoder_dtype": torch.float32}
    else:
        parts = adapter_of(both.right.unet, seed)
        given |= {"image_encoder_folder": "image_encoder" if encoder else None}
    flat = {f"{part}.{name}": v for part, values in parts.items() for name, v in values.items()}
    save_file(flat, both.folder / given["weight_name"])
    return lambda pipe: pipe.load_ip_adapter(str(both.folder), **given)


def taken_bytes(both: Pair) -> int:
    """Return the bytes of weights that stream or could."""
    report = next(iter(both.session.report().parts.values()))
    return int(report.resident_bytes + report.streamed_bytes)


@pytest.fixture(params=["half", "all"])
def sdxl(request: pytest.FixtureRequest, tmp_path: Path) -> Pair:
    return Pair("sdxl", tmp_path, request.param)


@pytest.mark.parametrize("when", ["between calls", "between steps"])
def test_ip_adapter_draws_what_it_draws_on_an_unswapped_pipeline(sdxl: Pair, when: str) -> None:
    edits: list[Edit] = [
        from_file(sdxl),
        lambda pipe: pipe.set_ip_adapter_scale(0.4),
        lambda pipe: pipe.set_ip_adapter_scale({"up": 0.9}),
        lambda pipe: pipe.unload_ip_adapter(),
    ]
    embeds = {"ip_adapter_image_embeds": [noise(2, 1, EMBEDDED)]}
    if when == "between steps":
        plain = sdxl.draw(len(edits) + 1, **embeds)
        assert not np.array_equal(sdxl.draw_while(edits, **embeds), plain)
    else:
        drawn = [sdxl.draw(**embeds)]
        for edit in edits:
            sdxl.edit(edit)
            drawn.append(sdxl.draw(**embeds))
        assert all(not np.array_equal(*two) for two in itertools.pairwise(drawn))
        assert np.array_equal(drawn[0], drawn[-1])
    sdxl.settle()
    sdxl.session.detach()
    sdxl.draw()


def test_two_ip_adapters_on_the_unet_alone(sdxl: Pair) -> None:
    both = [adapter_of(sdxl.right.unet, seed) for seed in (1, 2)]
    embeds = {"ip_adapter_image_embeds": [noise(2, 1, EMBEDDED), noise(2, 1, EMBEDDED)]}
    plain, taken = sdxl.draw(), taken_bytes(sdxl)
    sdxl.edit(lambda pipe: pipe.unet._load_ip_adapter_weights(both))
    assert not np.array_equal(sdxl.draw(**embeds), plain)
    sdxl.settle(**embeds)
    sdxl.draw(**embeds)
    assert taken_bytes(sdxl) > taken + sum(v.nbytes for v in both[0]["ip_adapter"].values())


@pytest.mark.parametrize("offload", ["half", "all"])
def test_ip_adapter_of_flux_draws_what_it_draws_on_an_unswapped_pipeline(
    offload: str, tmp_path: Path
) -> None:
    both = Pair("flux", tmp_path, offload)
    plain, taken = both.draw(), taken_bytes(both)
    both.edit(from_file(both))
    drawn = [plain, both.draw(**FLUX_EMBEDS)]
    both.settle(**FLUX_EMBEDS)
    both.draw(**FLUX_EMBEDS)
    assert taken_bytes(both) > taken, "its weights stream, too"
    edits: list[Edit] = [
        lambda pipe: pipe.set_ip_adapter_scale(0.4),
        lambda pipe: pipe.set_ip_adapter_scale([0.9, 0.0, 0.2]),
    ]
    for edit in edits:
        both.edit(edit)
        drawn.append(both.draw(**FLUX_EMBEDS))
    changed = both.draw_while(edits, **FLUX_EMBEDS)  # between steps
    assert not np.array_equal(changed, both.draw(3, **FLUX_EMBEDS))
    both.edit(from_file(both, seed=2))  # in place of the first
    drawn.append(both.draw(**FLUX_EMBEDS))
    assert all(not np.array_equal(*two) for two in itertools.combinations(drawn, 2))
    both.edit(lambda pipe: pipe.unload_ip_adapter())
    assert np.array_equal(both.draw(), plain)
    both.settle()
    both.draw()
    assert taken_bytes(both) == taken
    both.session.detach()
    assert np.array_equal(both.draw(), plain)


def test_detached_pipeline_keeps_its_ip_adapter(tmp_path: Path) -> None:
    both = Pair("flux", tmp_path, "half")
    both.edit(from_file(both))
    drawn = both.draw(**FLUX_EMBEDS)
    both.session.detach()
    assert np.array_equal(both.draw(**FLUX_EMBEDS), drawn)
    ours, theirs = (pipe.transformer.state_dict() for pipe in (both.pipe, both.right))
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    both.edit(lambda pipe: pipe.unload_ip_adapter())
    both.draw()


def test_pipeline_made_of_an_attached_one_draws_the_same(tmp_path: Path) -> None:
    both = Pair("flux", tmp_path, "half")
    plain = both.draw()
    ours, theirs = (FluxImg2ImgPipeline.from_pipe(pipe) for pipe in (both.pipe, both.right))
    call = both.call | {"image": noise(1, 3, 64, 64).clamp(-1, 1), "strength": 0.9}
    expected = draw(theirs, call)
    assert np.array_equal(draw(ours, call), expected)  # streams, though only one is attached
    config = both.session.config
    with blockswap.attach(ours, config=config) as session:
        assert session.sessions["transformer"] is both.session.sessions["transformer"]
        assert np.array_equal(draw(ours, call), expected)
        both.session.detach()
        assert np.array_equal(draw(ours, call), expected)
        assert session.state != "detached"
    assert np.array_equal(both.draw(), plain)


@pytest.mark.parametrize("way", ["pipeline", "each model"])
def test_another_dtype_is_computed_with(way: str, tmp_path: Path) -> None:
    both = Pair("flux", tmp_path, "all")
    plain = both.draw()

    def widen(pipe: Any) -> None:
        models = [pipe.transformer, pipe.vae, pipe.text_encoder, pipe.text_encoder_2]
        for part in [pipe] if way == "pipeline" else models:
            part.to(torch.float64)

    both.edit(widen)
    assert not np.array_equal(both.draw(), plain)
    both.session.detach()
    both.draw()
    assert "to" not in vars(both.pipe)


@pytest.mark.parametrize("given", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("times", [1, 2])
def test_pipeline_made_with_another_dtype_casts_what_it_shares(
    given: str, times: int, tmp_path: Path
) -> None:
    both = Pair("flux", tmp_path, "all")
    plain = both.draw(output_type="np")
    made = [both.pipe, both.right]
    for number in range(times):  # the second one is made of a pipeline that is not attached
        dtype = torch.float64 if number == times - 1 else torch.float32
        made = [FluxImg2ImgPipeline.from_pipe(pipe, **{given: dtype}) for pipe in made]
    names = ("transformer", "vae", "text_encoder", "text_encoder_2")
    assert {both.pipe.components[name].dtype for name in names} == {torch.float64}
    assert not np.array_equal(both.draw(output_type="np"), plain)
    call = both.call | {"image": noise(1, 3, 64, 64).clamp(-1, 1), "strength": 0.9}
    ours, theirs = made
    expected = draw(theirs, call)
    assert np.array_equal(draw(ours, call), expected)
    with blockswap.attach(ours, config=both.session.config) as session:
        assert session.sessions["transformer"] is both.session.sessions["transformer"]
        assert np.array_equal(draw(ours, call), expected)
    both.settle()
    assert both.session.report().parts["transformer"].streamed_bytes > 0
    both.session.detach()
    both.draw(output_type="np")


def test_pipeline_made_without_a_dtype_leaves_attached_models_theirs(tmp_path: Path) -> None:
    both = Pair("flux", tmp_path, "all", lambda pipe: pipe.to(torch.float64))
    plain = both.draw()
    FluxImg2ImgPipeline.from_pipe(both.pipe)
    assert np.array_equal(both.draw(), plain)
