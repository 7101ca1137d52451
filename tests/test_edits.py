"""Whoever edits weights between steps gets what the same edit gives on an unswapped model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from session_edits import (
    EDITS,
    add_to_data,
    copy_over,
    exchange_parameters,
    new_parameter,
    noise,
    tie_two_leaves,
)
from session_models import (
    Block,
    Stack,
    assert_same,
    attach,
    attach_ready,
    bits,
    bits_of,
    block_bytes,
    leaf_names,
    make_input,
    make_pair,
    make_ready,
    make_stack,
    steps,
)
from torch import nn

from blockswap.session import Session

X = make_input()
RESIDENCY = {"all": 0, "half": "half", "none": "1GB"}


def attach_with(model: Stack, residency: str) -> Session:
    """Attach with all, half or no pieces resident, and say so when it is not true.

    What is read outside its own call stays in any case.
    """
    offload = RESIDENCY[residency]
    if offload == "half":
        offload = f"{block_bytes(model) // 2}B"
    session = attach_ready(model, X, offload=offload)
    streamed = leaf_names(session, resident=False)
    if residency == "none":
        units = session._state.units.values()
        read_outside = {unit.name for unit in units if unit.is_read_outside}
        assert leaf_names(session, resident=True) <= read_outside
    assert bool(streamed) == (residency != "all")
    return session


def edit_both(edit: Callable[[Any], None], *models: nn.Module) -> None:
    for model in models:
        with torch.no_grad():
            edit(model)


@pytest.mark.parametrize("residency", RESIDENCY)
@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
def test_edit_between_steps_is_used_by_the_very_next_step(
    edit: Callable[[Stack], None], residency: str
) -> None:
    model, right = make_pair()
    session = attach_with(model, residency)
    before = steps(right, X)[0]
    edit_both(edit, model, right)
    assert not torch.equal(steps(right, X)[0], before), "this edit changes no output"
    assert_same(model, right, X)
    assert bits_of(model) == bits_of(right)
    session.detach()
    assert bits_of(model) == bits_of(right)
    assert_same(model, right, X, 1)


@pytest.mark.parametrize("residency", RESIDENCY)
def test_edits_while_learning_are_used_by_the_very_next_step(residency: str) -> None:
    model, right = make_pair()
    offload = RESIDENCY[residency]
    attach(model, offload=f"{block_bytes(model) // 2}B" if offload == "half" else offload)
    for _ in range(10):
        edit_both(add_to_data, model, right)
        assert_same(model, right, X, 1)


@pytest.mark.parametrize("residency", RESIDENCY)
def test_many_edits_in_a_row_stay_right(residency: str) -> None:
    model, right = make_pair()
    attach_with(model, residency)
    for edit in (exchange_parameters, tie_two_leaves, add_to_data, new_parameter, copy_over):
        edit_both(edit, model, right)
        assert_same(model, right, X, 2)


@pytest.mark.parametrize("residency", RESIDENCY)
def test_dtype_change_of_the_whole_model_is_used(residency: str) -> None:
    model, right = make_pair()
    session = attach_with(model, residency)
    edit_both(lambda m: m.to(torch.bfloat16), model, right)
    assert_same(model, right, X.bfloat16())
    make_ready(session, X.bfloat16())
    assert_same(model, right, X.bfloat16())
    assert bits_of(model) == bits_of(right)


def test_replaced_parameter_keeps_its_own_values() -> None:
    model = make_stack()
    attach_with(model, "half")
    leaf = model.blocks[2].up
    old = leaf.weight
    values = bits(old)
    leaf.weight = nn.Parameter(noise(old), requires_grad=False)
    steps(model, X, 3)
    assert bits(old) == values
    old.zero_()
    assert leaf.weight.abs().sum() > 0, "the old parameter still lies over the new one's bytes"


@pytest.mark.parametrize("residency", RESIDENCY)
def test_reads_between_steps_return_the_real_values(residency: str) -> None:
    model, right = make_pair()
    original = bits_of(right)
    attach(model, offload=RESIDENCY["none"] if residency == "half" else RESIDENCY[residency])
    for _ in range(8):
        assert bits_of(model) == original
        for (name, got), wanted in zip(model.named_parameters(), right.parameters(), strict=True):
            assert torch.equal(got, wanted), name
            assert (got.shape, got.dtype, got.stride()) == (
                wanted.shape,
                wanted.dtype,
                wanted.stride(),
            )
            assert got.untyped_storage().nbytes() == got.nbytes
        steps(model, X)


@pytest.mark.parametrize("residency", RESIDENCY)
def test_write_through_a_parameter_held_since_before_is_noticed(residency: str) -> None:
    model, right = make_pair()
    held, held_right = model.blocks[3].up.weight, right.blocks[3].up.weight
    attach_with(model, residency)
    for _ in range(2):
        edit_both(lambda p: p.add_(noise(p)), held, held_right)
        assert_same(model, right, X)


@pytest.mark.parametrize("residency", RESIDENCY)
@pytest.mark.parametrize("taken", ["while learning", "when ready"])
def test_write_through_data_taken_earlier_is_used_after_refresh(residency: str, taken: str) -> None:
    model, right = make_pair()
    if taken == "while learning":
        offload = RESIDENCY[residency]
        session = attach(model, offload="3MiB" if offload == "half" else offload)
        alias = model.blocks[3].up.weight.data
        make_ready(session, X)
    else:
        session = attach_with(model, residency)
        alias = model.blocks[3].up.weight.data
    steps(model, X)
    alias += noise(alias)
    right.blocks[3].up.weight.data += noise(alias)
    session.refresh()
    assert_same(model, right, X)


def test_untouched_weights_are_not_fetched_again() -> None:
    model = make_stack()
    session = attach_with(model, "half")
    before = session.report().refetched
    steps(model, X, 3)
    assert session.report().refetched == before
    model.blocks[3].up.weight.data += 1.0
    steps(model, X)
    assert session.report().refetched == before + 1


def test_block_of_the_model_keeps_its_class() -> None:
    model = make_stack()
    attach_with(model, "half")
    assert all(type(block) is Block for block in model.blocks)


# PEFT --------------------------------------------------------------------------------------------


def inject(model: Stack) -> Stack:
    """Put a LoRA with random values on the blocks' linears; the same on every model."""
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=8, target_modules=["up", "down"], init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        inject_adapter_in_model(config, model)
    return model


def tuners(model: nn.Module) -> list[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def merge(model: nn.Module) -> None:
    for tuner in tuners(model):
        tuner.merge()


def unmerge(model: nn.Module) -> None:
    for tuner in tuners(model):
        tuner.unmerge()


def unload(model: Stack) -> None:
    for block in model.blocks:
        block.up, block.down = block.up.get_base_layer(), block.down.get_base_layer()


@pytest.mark.parametrize("residency", RESIDENCY)
def test_peft_adapter_of_before_attaching_merges_and_unmerges(residency: str) -> None:
    model, right = (inject(each) for each in make_pair())
    before = steps(right, X)[0]
    attach_with(model, residency)
    for edit in (merge, unmerge, merge, unload):
        edit_both(edit, model, right)
        assert_same(model, right, X, 2)
        assert bits_of(model) == bits_of(right)
    assert not torch.equal(steps(right, X)[0], before)


@pytest.mark.parametrize("residency", RESIDENCY)
def test_peft_adapter_injected_while_attached_is_taken_in(residency: str) -> None:
    model, right = make_pair()
    before = steps(right, X)[0]
    session = attach_with(model, residency)
    for edit in (inject, merge, unload):
        edit_both(edit, model, right)
        assert_same(model, right, X, 2)
        assert not torch.equal(steps(right, X)[0], before)
    make_ready(session, X)
    assert_same(model, right, X, 1)


def test_merge_through_a_peft_model_is_used() -> None:
    from peft import LoraConfig, get_peft_model

    wrapped = []
    for each in make_pair():
        config = LoraConfig(r=8, target_modules=["up"], init_lora_weights=False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            wrapped.append(get_peft_model(each, config))
    model, right = wrapped
    attach_ready(model.get_base_model(), X, offload="4MiB")
    for edit in (lambda m: m.merge_adapter(), lambda m: m.unmerge_adapter()):
        edit_both(edit, model, right)
        assert_same(model, right, X, 2)
