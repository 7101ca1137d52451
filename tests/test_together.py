"""Several models that run one after the other in each step, as one cycle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from session_models import make_input, make_stack
from torch import nn

import blockswap
from blockswap.errors import ConfigError, UseError
from blockswap.model_state import ModelState
from blockswap.together import Cycle

X = make_input()
STEPS = 12


def make_models(count: int = 2) -> tuple[list[nn.Module], list[nn.Module]]:
    """Models and their unswapped twins, each with weights of its own."""
    models, twins = [], []
    for index in range(count):
        torch.manual_seed(index)
        model, twin = make_stack(), make_stack()
        for parameter in model.parameters():
            parameter.data = torch.randn_like(parameter) * 0.05
        twin.load_state_dict(model.state_dict())
        models.append(model)
        twins.append(twin)
    return models, twins


def run(models: list[nn.Module], x: torch.Tensor = X) -> torch.Tensor:
    with torch.no_grad():
        for model in models:
            x = torch.tanh(model(x))
    return x


def attach(models: list[nn.Module], **options: Any) -> blockswap.Session:
    given = {"device": "cpu", "offload": "1GB", "check": True} | options
    return blockswap.attach(*models, **given)


@pytest.mark.parametrize("count", [2, 3])
def test_all_of_them_stream_in_one_cycle_bit_identical(count: int) -> None:
    models, twins = make_models(count)
    wanted = run(twins)
    with attach(models) as session:
        for _ in range(STEPS):
            assert torch.equal(run(models), wanted)
        assert session.state == "ready"
        report = session.report()
        assert report.steps == STEPS
        assert report.copies_per_step == report.num_pieces > 0
        engine = session._state.engine
        missed = engine.counters.mispredicted
        run(models)
        run(models)
        assert engine.counters.mispredicted == missed  # the second model's are fetched ahead, too
    assert torch.equal(run(models), wanted)


def test_one_budget_serves_all_of_them() -> None:
    models, _ = make_models()
    alone = blockswap.leaf_bytes(models[0])
    with attach(models, offload=f"{alone // 2}B") as session:
        for _ in range(STEPS):
            run(models)
        assert alone // 2 <= session.report().streamed_bytes < alone


def test_the_timeline_holds_the_pieces_of_all_of_them() -> None:
    models, _ = make_models()
    with attach(models) as session:
        for _ in range(STEPS):
            run(models)
        timeline = session.timeline()
        assert timeline is not None
        first = {span.block.partition(".")[0] for span in timeline.spans}
    assert len(first) == 2


def test_a_step_without_the_last_model_teaches_nothing_and_breaks_nothing() -> None:
    models, twins = make_models()
    wanted, first = run(twins), run(twins[:1])
    with attach(models) as session:
        for step in range(2 * STEPS):
            if step % 3 == 2:
                assert torch.equal(run(models[:1]), first)
            else:
                assert torch.equal(run(models), wanted)
        assert session.state == "ready"


def test_models_called_in_another_order_stay_right() -> None:
    models, twins = make_models()
    back = run(twins[::-1])
    with attach(models):
        for _ in range(STEPS):
            assert torch.equal(run(models[::-1]), back)


def test_edits_between_the_models_of_a_step_count() -> None:
    models, twins = make_models()
    with attach(models):
        for step in range(STEPS):
            for index in range(2):
                for each in (models, twins):
                    with torch.no_grad():
                        next(each[1].blocks[2].parameters()).add_(step / 100)
                x = torch.randn(X.shape, generator=torch.Generator().manual_seed(step))
                assert torch.equal(
                    run(models[index : index + 1], x), run(twins[index : index + 1], x)
                )


def test_an_error_in_the_second_model_leaves_both_usable() -> None:
    models, twins = make_models()
    wanted = run(twins)
    with attach(models) as session:
        for step in range(STEPS):
            if step % 4 == 1:
                run(models[:1])
                with pytest.raises(RuntimeError), torch.no_grad():
                    models[1](torch.ones(3, 3))
            assert torch.equal(run(models), wanted)
        assert session.state == "ready"


def test_shapes_of_the_second_model_are_learned_with_those_of_the_first() -> None:
    models, twins = make_models()
    x = torch.cat([X, X])
    with attach(models) as session:
        for batch in (X, x, X, x):
            for _ in range(STEPS):
                assert torch.equal(run(models, batch), run(twins, batch))
            assert session.state == "ready"


# ---- attach -------------------------------------------------------------------------------------


def test_attaching_the_same_models_again_returns_the_session() -> None:
    models, _ = make_models()
    with attach(models) as session:
        assert attach(models) is session
        session.pause()
        assert attach(models) is session
        assert session.state == "learning"


@pytest.mark.parametrize("pick", [lambda a, b: [a], lambda a, b: [b], lambda a, b: [b, a]])
def test_attaching_some_of_them_otherwise_is_refused(pick: Any) -> None:
    models, _ = make_models()
    with attach(models), pytest.raises(UseError, match="attached already, and not as"):
        attach(pick(*models))


def test_detach_leaves_no_trace_on_any_of_them() -> None:
    models, _ = make_models()
    before = [[(m, list(m.__dict__)) for m in model.modules()] for model in models]
    session = attach(models)
    run(models)
    session.detach()
    assert [[(m, list(m.__dict__)) for m in model.modules()] for model in models] == before


def test_what_cannot_be_one_cycle_is_refused_by_name() -> None:
    (a, b), _ = make_models()
    with pytest.raises(ConfigError, match="given twice"):
        attach([a, a])
    with pytest.raises(ConfigError, match="is part of"):
        attach([a, a.blocks[0]])
    with pytest.raises(ConfigError, match="got the object str"):
        attach([a, b, "10GiB"])
    with pytest.raises(ConfigError, match="vram is given twice"):
        blockswap.attach(a, "1GiB", vram="1GiB", device="cpu")
    assert not any("_blockswap_session" in m.__dict__ for m in (a, b))


# ---- the cycle ----------------------------------------------------------------------------------


X0, Y1 = (0, "x"), (1, "y")


def test_a_step_ends_with_the_last_model_and_is_complete_once_its_shapes_were_guessed() -> None:
    cycle = Cycle(2)
    assert cycle.enter(*X0) == (X0,)
    assert cycle.leave(0, True) is None
    assert cycle.enter(*Y1) is None
    assert cycle.leave(1, True) is False  # nobody knew of y
    assert cycle.enter(*X0) == (X0, Y1)
    assert cycle.leave(0, True) is None
    assert cycle.enter(*Y1) is None
    assert cycle.leave(1, True) is True


def test_the_first_model_begins_a_new_step_whatever_is_missing_of_the_last() -> None:
    cycle = Cycle(2)
    cycle.enter(*X0)
    cycle.leave(0, True)
    assert cycle.enter(*X0) == (X0,)
    assert cycle.leave(0, False) is False
    assert cycle.enter(*Y1) == (Y1,)
    assert cycle.leave(1, True) is False  # the first one did not run


def test_a_part_that_was_not_guessed_begins_a_step_of_its_own() -> None:
    cycle = Cycle(2)
    run_cycle(cycle, X0, Y1)
    cycle.enter(*X0)
    cycle.leave(0, True)
    assert cycle.enter(1, "z") == (X0, (1, "z"))
    assert cycle.leave(1, True) is False
    assert cycle.enter(*X0) == (X0, (1, "z"))  # guessed from the last whole step


def test_a_step_that_leaves_a_model_out_changes_no_guess() -> None:
    cycle = Cycle(3)
    parts = [(number, "x") for number in range(3)]
    run_cycle(cycle, *parts)
    assert run_cycle(cycle, parts[0], parts[2]) is False
    assert run_cycle(cycle, *parts) is True
    assert run_cycle(cycle, parts[1], parts[2]) is False
    assert run_cycle(cycle, *parts) is True


def run_cycle(cycle: Cycle, *parts: tuple[int, str]) -> bool | None:
    done: bool | None = None
    for number, key in parts:
        cycle.enter(number, key)
        done = cycle.leave(number, True)
    return done


def test_one_model_is_a_cycle_of_its_own() -> None:
    cycle = Cycle(1)
    for _ in range(2):
        assert cycle.enter(*X0) == (X0,)
        assert cycle.leave(0, True) is True


# ---- steps that are not whole --------------------------------------------------------------------


def test_models_of_like_shapes_do_not_take_each_others_plans(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    models, twins = make_models()
    wanted = [run([twin]) for twin in twins]
    copied: list[object] = []
    monkeypatch.setattr(ModelState, "divert", lambda _, unit: copied.append(unit))
    with attach(models):
        for model in (0, 1, 0):  # each alone, with the same input
            for _ in range(STEPS):
                assert torch.equal(run(models[model : model + 1]), wanted[model])
    assert not copied  # no plan lacked the leaves that ran


def test_memory_given_back_between_the_models_of_a_step_is_taken_again() -> None:
    models, twins = make_models()
    wanted = run(twins)
    for options in ({}, {"offload": 0}):
        with attach(models, **options) as session:
            for _ in range(STEPS):
                run(models)
            x = run(models[:1])
            session.vacate()
            assert session.report().pool_bytes == 0
            assert torch.equal(run(models[1:], x), wanted)
            assert session.report().pool_bytes > 0
            assert torch.equal(run(models), wanted)


def test_the_models_themselves_cannot_be_blocks() -> None:
    models, twins = make_models()
    wanted = run(twins)
    with pytest.raises(ConfigError, match="the model itself cannot be a block"):
        attach(models, blocks=models)
    with attach(models, blocks=["Stack*"]) as session:  # what lies inside them, then
        assert torch.equal(run(models), wanted)
        assert not set(models) & {block.module for block in session._state.blocks}
    assert not any("forward" in vars(model) for model in models)


def test_a_block_that_two_models_share_streams_once() -> None:
    models, twins = make_models()
    models[1].blocks[1] = models[0].blocks[1]
    twins[1].blocks[1] = twins[0].blocks[1]
    wanted = run(twins)
    with attach(models) as session:
        for _ in range(STEPS):
            assert torch.equal(run(models), wanted)
        assert session.state == "ready"
    assert torch.equal(run(models), wanted)


def test_a_session_that_has_ended_leaves_the_next_one_alone() -> None:
    models, twins = make_models()
    wanted = run(twins)
    first = attach(models)
    first.detach()
    with attach(models) as second:
        first.detach()
        assert attach(models) is second
        assert torch.equal(run(models), wanted)
