"""Forwards of every kind while attached give, bit for bit, what the unswapped model gives."""

from __future__ import annotations

import pytest
import torch
from session_models import (
    NUM_BLOCKS,
    Block,
    DtypeBlock,
    PeekedLeafBlock,
    TwiceBlock,
    UncalledLeafBlock,
    assert_same,
    attach,
    attach_ready,
    bits_of,
    make_input,
    make_pair,
    make_ready,
    steps,
)

from blockswap.bench import zoo
from blockswap.errors import UseError

X = make_input()
OFFLOADS = [0, "4MiB", "1GB"]


@pytest.mark.parametrize("offload", OFFLOADS)
def test_fifty_steps_are_identical(offload: int | str) -> None:
    model, right = make_pair()
    session = attach(model, offload=offload)
    assert_same(model, right, X, 50)
    report = session.report()
    assert (report.steps, report.state, report.mispredicted) == (50, "ready", 0)


@pytest.mark.parametrize("block", [TwiceBlock, DtypeBlock])
@pytest.mark.parametrize("options", [{}, {"block_size": 1}, {"block_size": "2MiB"}])
def test_leaves_that_run_twice_or_tell_their_dtype_stream(
    block: type[Block], options: dict[str, object]
) -> None:
    model, right = make_pair(block)
    session = attach(model, offload="1GB", **options)
    assert_same(model, right, X, 12)
    report = session.report()
    assert report.state == "ready"
    assert report.notes == ()
    assert report.resident_bytes < report.leaf_bytes / 50
    if block is DtypeBlock:  # the other one's leaves may lie in pieces that take turns
        assert report.mispredicted == 0


@pytest.mark.parametrize("kind", zoo.KINDS)
@torch.no_grad()
def test_diffusers_model_runs_identical_and_comes_back(kind: zoo.Kind) -> None:
    model = zoo.build(kind, "tiny", torch.bfloat16)
    inputs = zoo.make_inputs(kind, model, dtype=torch.bfloat16)
    wanted, before = model(**inputs)[0], bits_of(model)
    session = attach(model, offload="1GB")
    for _ in range(8):
        assert torch.equal(model(**inputs)[0], wanted)
    assert session.state == "ready"
    assert session.report().streamed_bytes > 0
    session.detach()
    assert bits_of(model) == before
    assert torch.equal(model(**inputs)[0], wanted)


def test_other_shape_gets_its_own_plan_and_the_first_one_comes_back() -> None:
    model, right = make_pair()
    session = attach_ready(model, X, offload="4MiB")
    other = make_input(batch=9)
    assert_same(model, right, other, 1)
    assert session.state == "learning"
    make_ready(session, other)
    for x in (X, other, X):
        assert_same(model, right, x, 2)
        assert session.state == "ready"


def test_shapes_that_alternate_from_the_start_become_ready() -> None:
    model, right = make_pair()
    session = attach(model, offload="4MiB")
    for _ in range(16):
        assert_same(model, right, X, 1)
        assert_same(model, right, make_input(batch=9), 1)
    assert session.state == "ready"


@pytest.mark.parametrize("offload", OFFLOADS)
def test_block_and_leaf_called_alone_are_right(offload: int | str) -> None:
    model, right = make_pair()
    session = attach(model, offload=offload)
    for _ in range(8):
        assert_same(model.blocks[3], right.blocks[3], X, 2)
        assert_same(model.blocks[1].mix, right.blocks[1].mix, X, 2)
        assert_same(model.blocks[1].norm, right.blocks[1].norm, X, 1)
        assert_same(model, right, X, 1)
        assert bits_of(model) == bits_of(right)
    assert session.state == "ready"


@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize("block", [UncalledLeafBlock, PeekedLeafBlock])
def test_weight_read_by_another_module_is_never_stale(
    block: type[Block], offload: int | str
) -> None:
    model, right = make_pair(block)
    session = attach(model, offload=offload)
    for _ in range(12):
        assert_same(model, right, X, 1)
        for each in (model, right):
            each.blocks[2].up.weight.data += 0.01
            each.blocks[2].mix.weight.data *= 1.01
    assert session.state == "ready"
    assert bits_of(model) == bits_of(right)


@pytest.mark.parametrize("block", [UncalledLeafBlock, PeekedLeafBlock])
def test_leaf_whose_weight_another_module_reads_is_named_in_the_report(block: type[Block]) -> None:
    model, _ = make_pair(block)
    session = attach_ready(model, X, offload="4MiB")
    notes = "\n".join(session.report().notes)
    for index in range(NUM_BLOCKS):
        assert f"blocks.{index}.up" in notes


@pytest.mark.parametrize("offload", OFFLOADS)
def test_block_skipped_every_second_step_is_right(offload: int | str) -> None:
    model, right = make_pair()
    attach(model, offload=offload)
    for number in range(20):
        for each in (model, right):
            each.order = [0, 1, 2, 3, 4, 5] if number % 2 else [0, 1, 3, 4, 5]
        assert_same(model, right, X, 1)


@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize("order", [[0, 1, 2, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5, 0], [0, 0, 1, 1, 2]])
def test_block_that_runs_twice_is_right(order: list[int], offload: int | str) -> None:
    model, right = make_pair()
    session = attach(model, offload=offload)
    for each in (model, right):
        each.order = order
    assert_same(model, right, X, 30)
    assert session.state == "ready"


def test_cycle_that_changes_for_good_is_learned_anew() -> None:
    model, right = make_pair()
    session = attach_ready(model, X, offload="1GB")
    for each in (model, right):
        each.order = [5, 4, 3, 2, 1, 0]
    assert_same(model, right, X, 16)
    before = session.report().mispredicted
    assert before > 0
    assert_same(model, right, X, 3)
    assert session.report().mispredicted == before


# Grad, inference mode, autocast ------------------------------------------------------------------


def test_grad_mode_is_refused_only_where_a_tensor_requires_grad() -> None:
    model, right = make_pair()
    attach_ready(model, X, offload="4MiB")
    wanted = steps(right, X)[0]
    assert torch.equal(model(X), wanted)
    with pytest.raises(UseError, match=r"torch\.no_grad\(\).*requires_grad_\(False\)"):
        model(X.clone().requires_grad_(True))
    with pytest.raises(UseError, match="require grad"):
        model(x=X.clone().requires_grad_(True))
    model.blocks[3].up.weight.requires_grad_(True)
    with pytest.raises(UseError, match="require grad"):
        model(X)
    assert_same(model, right, X, 2)
    model.requires_grad_(False)
    assert torch.equal(model(X), wanted)


def test_inference_mode_and_no_grad_may_alternate() -> None:
    model, right = make_pair()
    session = attach(model, offload="4MiB")
    wanted = steps(right, X)[0]
    for _ in range(5):
        with torch.inference_mode():
            assert torch.equal(model(X), wanted)
        assert_same(model, right, X, 1)
    assert not any(p.is_inference() for p in model.parameters())
    assert session.state == "ready"
    for each in (model, right):
        each.blocks[2].up.weight.data += 0.01
    with torch.inference_mode():
        assert torch.equal(model(X), right(X))


def test_weights_that_were_cast_in_inference_mode_stream() -> None:
    pair = make_pair()
    with torch.inference_mode():
        model, right = (each.to(torch.bfloat16) for each in pair)
        assert all(p.is_inference() for p in model.parameters())
        attach(model, offload="4MiB")
        for _ in range(9):
            assert torch.equal(model(X.to(torch.bfloat16)), right(X.to(torch.bfloat16)))


@pytest.mark.parametrize("offload", OFFLOADS)
def test_autocast_gives_what_it_gives_unswapped(offload: int | str) -> None:
    model, right = make_pair()
    attach(model, offload=offload)
    for _ in range(9):
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
            wanted, got = right(X), model(X)
            assert torch.is_autocast_cache_enabled()
        assert got.dtype == torch.bfloat16
        assert torch.equal(got, wanted)
    assert_same(model, right, X, 2)
