"""Which components of all pipelines that diffusers exports run each step: a new one is looked at."""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Iterator

import diffusers
import pytest
from torch import nn

from blockswap.components import DENOISER, is_donor, is_network

# What the classes of denoisers are called; what is called so and is none stands in NONE.
LOOKS = re.compile(r"UNet|Transformer|Prior|ControlNet|Adapter|DiffNeXt|DiTModel")
NONE = {
    # Runs once a call, before the first step.
    ("adapter", "MultiAdapter"),
    ("adapter", "T2IAdapter"),
    # Only lends its weights.
    ("controlnet", "ControlNetXSAdapter"),
    ("motion_adapter", "MotionAdapter"),
    ("text_unet", "UNetFlatConditionModel"),
}
# Names that tell nothing: taken by the class, where no other name tells.
BY_CLASS = {
    ("decoder", "StableCascadeUNet"),
    ("decoder", "UNet2DConditionModel"),
    ("decoder", "WuerstchenDiffNeXt"),
    ("image_unet", "UNet2DConditionModel"),
    ("super_res_first", "UNet2DModel"),
    ("super_res_last", "UNet2DModel"),
    ("text_unet", "UNet2DConditionModel"),  # so it is declared; made of UNetFlatConditionModel
}
# Classes that tell nothing: taken by the name.
BY_NAME = {("unet", "AudioLDM2UNet2DConditionModel"), ("unet", "UniDiffuserModel")}


def classes_in(annotation: object) -> Iterator[type]:
    """Yield the classes of modules that an annotation names."""
    if inspect.isclass(annotation) and issubclass(annotation, nn.Module):
        yield annotation
    for inner in typing.get_args(annotation):
        yield from classes_in(inner)


@pytest.fixture(scope="module")
def declared() -> set[tuple[str, type]]:
    """Return the components of all pipelines: each name with each class that is declared for it."""
    found: set[tuple[str, type]] = set()
    num_pipelines = 0
    for pipeline in (getattr(diffusers, name) for name in dir(diffusers) if "Pipeline" in name):
        is_there = inspect.isclass(pipeline) and not hasattr(pipeline, "_backends")
        if not is_there or not issubclass(pipeline, diffusers.DiffusionPipeline):
            continue
        num_pipelines += 1
        hints = typing.get_type_hints(pipeline.__init__)
        names = inspect.signature(pipeline.__init__).parameters.keys()
        undeclared = names - hints.keys() - {"self", "args", "kwargs", "scheduler"}
        assert not undeclared, f"{pipeline.__name__} does not say what these are"
        found |= {(name, kind) for name in names for kind in classes_in(hints.get(name))}
    assert num_pipelines > 250
    return found


def named(components: set[tuple[str, type]]) -> set[tuple[str, str]]:
    return {(name, kind.__name__) for name, kind in components}


def is_found(name: str, kind: type) -> bool:
    return not is_donor(kind) and (bool(DENOISER.fullmatch(name)) or is_network(kind))


def is_timed(kind: type) -> bool:
    """Whether a model is told the step."""
    forward = getattr(kind, "forward", None)
    return callable(forward) and any(
        name.startswith("timestep") for name in inspect.signature(forward).parameters
    )


def test_every_component_that_looks_like_a_denoiser_is_one_or_on_the_list_of_others(
    declared: set[tuple[str, type]],
) -> None:
    ours = {(n, kind) for n, kind in declared if kind.__module__.startswith("diffusers.")}
    looks = {
        (name, kind)
        for name, kind in ours
        if LOOKS.search(kind.__name__) or is_timed(kind) or DENOISER.fullmatch(name)
    }
    assert len(looks) > 100
    assert named({(n, kind) for n, kind in looks if not is_found(n, kind)}) == NONE


def test_names_that_tell_nothing_are_found_by_the_class(declared: set[tuple[str, type]]) -> None:
    found = {(name, kind) for name, kind in declared if is_found(name, kind)}
    assert named({(n, kind) for n, kind in found if not DENOISER.fullmatch(n)}) == BY_CLASS
    assert named({(n, kind) for n, kind in found if not is_network(kind)}) == BY_NAME


def test_no_text_encoder_no_vae_and_no_upsampler_is_taken_for_a_denoiser(
    declared: set[tuple[str, type]],
) -> None:
    whole = re.compile(r"vae|.*_vae|vqgan|movq|vqvae|.*encoder.*|.*upsampler|vocoder|adapter|bert")
    others = {(name, kind) for name, kind in declared if whole.fullmatch(name)}
    assert len(others) > 60
    assert not named({(name, kind) for name, kind in others if is_found(name, kind)})
