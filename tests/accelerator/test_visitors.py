"""A text encoder that does not fit under the cap streams, and leaves when the denoiser runs."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import blockswap
from tests.pipelines import draw, make, with_large_encoder

MIB = 2**20


def on_fake(pipe: Any, call: dict[str, Any]) -> np.ndarray:
    """What the unswapped pipeline draws on the fake device."""
    pipe.to("fake")
    expected = draw(pipe, call)
    pipe.to("cpu")
    return expected


def capped(accelerator: ModuleType, folder: Path) -> tuple[Any, dict[str, Any], int]:
    """Return a pipeline whose text encoder has more weights than the cap."""
    pipe, call = make("flux", folder)
    call["output_type"] = "latent"
    with_large_encoder(pipe)
    gc.collect()  # of what earlier tests have left
    cap = accelerator.memory_allocated() + 20 * MIB
    assert sum(p.nbytes for p in pipe.text_encoder_2.parameters()) > 24 * MIB
    return pipe, call, cap


def test_an_encoder_larger_than_the_cap_streams_and_the_cap_holds(
    accelerator: ModuleType, tmp_path: Path
) -> None:
    pipe, call, cap = capped(accelerator, tmp_path)
    expected = on_fake(pipe, call)
    with blockswap.attach(pipe, device="fake", vram=cap, check=True) as session:
        assert list(session.sessions) == ["transformer", "text_encoder_2"]
        for _ in range(8):
            accelerator.reset_peak_memory_stats()
            assert np.array_equal(draw(pipe, call), expected)
            assert accelerator.max_memory_allocated() <= cap
        assert session.state == "ready"
        report = session.report()
        encoder = report.parts["text_encoder_2"]
        assert encoder.streamed_bytes > 24 * MIB
        assert encoder.peak_device_bytes is not None and encoder.peak_device_bytes <= cap
        assert set(report.guests) == {"text_encoder", "vae"}
    assert {p.device.type for p in pipe.text_encoder_2.parameters()} == {"cpu"}
    assert np.array_equal(on_fake(pipe, call), expected)


def test_while_the_denoiser_runs_nothing_of_the_encoder_is_on_the_device(
    accelerator: ModuleType, tmp_path: Path
) -> None:
    pipe, call, cap = capped(accelerator, tmp_path)
    seen: list[tuple[int, set[str]]] = []
    with blockswap.attach(pipe, device="fake", vram=cap) as session:
        encoder, denoiser = (session.sessions[n] for n in ("text_encoder_2", "transformer"))

        def look(*_: object) -> None:
            kinds = {p.device.type for p in pipe.text_encoder_2.parameters()}
            seen.append((encoder._state.memory.pool_bytes, kinds))

        pipe.transformer.transformer_blocks[0].register_forward_hook(look)
        draw(pipe, call)
        draw(pipe, call)
        assert seen and all(held == (0, {"cpu"}) for held in seen)
        assert denoiser.report().pool_bytes > 0


def test_what_the_denoiser_keeps_stays_while_an_encoder_finds_room_beside_it(
    accelerator: ModuleType, tmp_path: Path
) -> None:
    pipe, call, cap = capped(accelerator, tmp_path)
    expected = on_fake(pipe, call)
    with blockswap.attach(pipe, device="fake", vram=cap, check=True) as session:
        encoder, denoiser = (session.sessions[n] for n in ("text_encoder_2", "transformer"))
        for _ in range(9):
            draw(pipe, call)
        assert encoder.state == denoiser.state == "ready"
        held, seen = denoiser.report().pool_bytes, []

        def look(*_: object) -> None:
            seen.append(denoiser._state.memory.pool_bytes)

        handle = pipe.text_encoder_2.encoder.block[3].register_forward_hook(look)
        accelerator.reset_peak_memory_stats()
        assert np.array_equal(draw(pipe, call), expected)
        handle.remove()
        assert seen == [held] and held > 0
        assert accelerator.max_memory_allocated() <= cap


def test_beside_an_encoder_that_has_run_once_the_denoiser_keeps_what_leaves_it_room(
    accelerator: ModuleType, tmp_path: Path
) -> None:
    pipe, call, cap = capped(accelerator, tmp_path)
    expected = on_fake(pipe, call)
    seen: list[int] = []

    def look(*_: object) -> None:
        seen.append(denoiser._state.memory.pool_bytes)

    with blockswap.attach(pipe, device="fake", vram=cap, check=True) as session:
        encoder, denoiser = (session.sessions[n] for n in ("text_encoder_2", "transformer"))
        handle = pipe.text_encoder_2.encoder.block[3].register_forward_hook(look)
        for _ in range(9):
            accelerator.reset_peak_memory_stats()
            assert np.array_equal(draw(pipe, call), expected)
            assert accelerator.max_memory_allocated() <= cap
        handle.remove()
        assert encoder.state == "ready"
        assert seen[0] == 0 and min(seen[2:]) > 0, "in the second call the denoiser still learns"


def test_what_never_streams_of_an_encoder_waits_in_pinned_memory_unless_that_is_bounded(
    accelerator: ModuleType, tmp_path: Path
) -> None:
    pipe, call, cap = capped(accelerator, tmp_path)
    expected = on_fake(pipe, call)
    shared = pipe.text_encoder_2.shared.weight
    for options in ({}, {"host_memory": "8MiB"}):
        with blockswap.attach(pipe, device="fake", vram=cap, **options) as session:
            assert np.array_equal(draw(pipe, call), expected)
            fixed = session.sessions["text_encoder_2"]._state.fixed
            assert shared.device.type == "cpu"
            assert (fixed.pinned_bytes >= shared.nbytes) is not bool(options)
            assert np.array_equal(draw(pipe, call), expected)
        assert fixed.pinned_bytes == 0
    assert np.array_equal(on_fake(pipe, call), expected)


def test_the_denoiser_leaves_for_an_encoder_that_turns_out_to_need_more(
    accelerator: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, call, cap = capped(accelerator, tmp_path)
    expected = on_fake(pipe, call)
    block = type(pipe.text_encoder_2.encoder.block[0])
    plain, wanted = block.forward, SimpleNamespace(bytes=0)

    def needing(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        torch.empty(wanted.bytes, dtype=torch.uint8, device=hidden_states.device)
        return plain(self, hidden_states, *args, **kwargs)

    needing.__module__ = plain.__module__  # else it is another tool's, which may keep count
    monkeypatch.setattr(block, "forward", needing)
    with blockswap.attach(pipe, device="fake", vram=cap, check=True) as session:
        encoder, denoiser = (session.sessions[n] for n in ("text_encoder_2", "transformer"))
        for _ in range(9):
            draw(pipe, call)
        held = denoiser.report().pool_bytes
        wanted.bytes = cap - accelerator.memory_allocated() + held // 2
        for _ in range(2):
            assert np.array_equal(draw(pipe, call), expected)
        report = encoder.report()
        assert report.ladder == {"neighbours": 1}
        assert report.ooms == 1


def test_what_was_written_to_an_encoder_between_calls_counts(
    accelerator: ModuleType, tmp_path: Path
) -> None:
    pipe, call, cap = capped(accelerator, tmp_path)

    def edit(scale: float) -> None:
        with torch.no_grad():
            for parameter in pipe.text_encoder_2.parameters():
                parameter.data *= scale

    before = on_fake(pipe, call)
    edit(1.5)
    expected = on_fake(pipe, call)
    edit(1 / 1.5)
    assert not np.array_equal(expected, before)
    pipe.text_encoder_2.load_state_dict(state := pipe.text_encoder_2.state_dict())
    assert state
    with blockswap.attach(pipe, device="fake", vram=cap, check=True):
        unedited = draw(pipe, call)
        edit(1.5)
        first = draw(pipe, call)
        assert not np.array_equal(first, unedited)
        assert np.array_equal(draw(pipe, call), first)
    assert np.array_equal(on_fake(pipe, call), first)


def test_a_pipeline_pauses_and_resumes_with_its_encoder(
    accelerator: ModuleType, tmp_path: Path
) -> None:
    pipe, call, cap = capped(accelerator, tmp_path)
    expected = on_fake(pipe, call)
    with blockswap.attach(pipe, device="fake", vram=cap) as session:
        draw(pipe, call)
        session.pause()
        assert np.array_equal(on_fake(pipe, call), expected)
        session.resume()
        assert np.array_equal(draw(pipe, call), expected)


@torch.no_grad()
def test_a_part_of_an_encoder_may_be_called_alone_and_the_denoiser_leaves_for_it(
    accelerator: ModuleType, tmp_path: Path
) -> None:
    pipe, call, cap = capped(accelerator, tmp_path)
    ids = torch.ones(1, 8, dtype=torch.long, device="fake")
    expected = pipe.text_encoder_2.to("fake").encoder(input_ids=ids)[0].cpu()
    pipe.to("cpu")
    with blockswap.attach(pipe, device="fake", vram=cap, check=True) as session:
        for _ in range(3):
            draw(pipe, call)
            assert torch.equal(pipe.text_encoder_2.encoder(input_ids=ids)[0].cpu(), expected)
            assert session.sessions["transformer"]._state.memory.pool_bytes == 0


def test_an_encoder_has_left_after_attaching_and_after_resuming(
    accelerator: ModuleType, tmp_path: Path
) -> None:
    pipe, call, cap = capped(accelerator, tmp_path)
    with blockswap.attach(pipe, device="fake", vram=cap) as session:
        encoder = session.sessions["text_encoder_2"]
        for _ in range(2):
            assert encoder._state.memory.pool_bytes == 0
            assert {p.device.type for p in pipe.text_encoder_2.parameters()} == {"cpu"}
            draw(pipe, call)
            session.pause()
            session.resume()


@torch.inference_mode()
def test_inference_mode_leaves_ordinary_weights_and_edits_in_a_turn_are_kept(
    accelerator: ModuleType, tmp_path: Path
) -> None:
    with torch.inference_mode(mode=False):
        pipe, call, cap = capped(accelerator, tmp_path)
        shared = pipe.text_encoder_2.shared.weight
        before = shared.detach().clone()
    with blockswap.attach(pipe, device="fake", vram=cap):
        pipe.text_encoder_2(torch.ones(1, 8, dtype=torch.long, device="fake"))
        assert shared.device.type == "fake"
        shared.data *= 1.5
        draw(pipe, call)
        assert shared.device.type == "cpu" and not shared.is_inference()
    assert torch.equal(shared, before * 1.5)


def test_a_pipeline_that_lies_on_the_device_streams_its_encoder_as_well(
    accelerator: ModuleType, tmp_path: Path
) -> None:
    pipe, call, _ = capped(accelerator, tmp_path)
    expected = on_fake(pipe, call)
    pipe.to("fake")
    cap = accelerator.memory_allocated()
    with blockswap.attach(pipe, device="fake", vram=cap * 2 // 5, check=True) as session:
        assert "text_encoder_2" in session.sessions
        for _ in range(2):
            assert np.array_equal(draw(pipe, call), expected)
    assert {p.device.type for p in pipe.text_encoder_2.parameters()} == {"fake"}
    pipe.to("cpu")


def test_a_pipeline_that_is_dropped_while_its_denoiser_stayed_beside_its_encoder_is_collected(
    accelerator: ModuleType, tmp_path: Path
) -> None:
    before = accelerator.memory_allocated()
    pipe, call, cap = capped(accelerator, tmp_path)
    session = blockswap.attach(pipe, device="fake", vram=cap)
    for _ in range(9):
        draw(pipe, call)
    assert session.sessions["text_encoder_2"]._state.memory.neighbour_bytes > 0
    parts = (pipe, session, *session.sessions.values(), pipe.transformer, pipe.text_encoder_2)
    gone = [weakref.ref(part) for part in parts]
    del pipe, session, parts
    gc.collect()
    assert [ref() for ref in gone] == [None] * len(gone)
    assert accelerator.memory_allocated() <= before


@pytest.mark.parametrize("held_mib", [0, 12])
def test_an_encoder_streams_where_tensors_of_the_script_take_its_room(
    accelerator: ModuleType, base: int, held_mib: int, tmp_path: Path
) -> None:
    pipe, call = make("flux", tmp_path)
    call["output_type"] = "latent"
    with_large_encoder(pipe, blocks=8)
    num_bytes = sum(p.nbytes for p in pipe.text_encoder_2.parameters())
    assert 16 * MIB < num_bytes < 20 * MIB
    expected = on_fake(pipe, call)
    cap = base + 28 * MIB
    gc.collect()  # the weights that were on the device
    held = torch.empty(held_mib * MIB + 1, dtype=torch.int8, device="fake")
    pipe.text_encoder.to("fake")  # of the pipeline: takes no room from the script's
    with blockswap.attach(pipe, device="fake", vram=cap, check=True) as session:
        assert ("text_encoder_2" in session.sessions) is (held_mib > 0)
        for _ in range(4):
            accelerator.reset_peak_memory_stats()
            assert np.array_equal(draw(pipe, call), expected)
            assert accelerator.max_memory_allocated() <= cap
    del held
