"""Every option that is supported does something: each test fails when its option is ignored.

``copy_streams`` cannot be seen on the CPU, whose copies are complete when they are enqueued: that
the streams work at the same time is shown on the fake device.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from session_models import (
    NUM_BLOCKS,
    assert_same,
    attach,
    attach_ready,
    block_bytes,
    blocks_of,
    leaf_names,
    leaves_by_piece,
    make_input,
    make_pair,
    make_stack,
    piece_bytes,
    steps,
)
from torch import nn

from blockswap import _C
from blockswap.errors import CapError, ConfigError
from blockswap.report import PieceSpan
from blockswap.session import Session

X = make_input()
KIB, MIB = 2**10, 2**20
LARGEST_LEAF_BYTES = 514 * KIB
ALL_BLOCKS = {f"blocks.{index}" for index in range(NUM_BLOCKS)}


def ready(**options: Any) -> Session:
    """Attach a new stack, settle its plan and check that it is right under these options."""
    model, right = make_pair()
    session = attach_ready(model, X, **options)
    assert_same(model, right, X, 2)
    return session


def last_spans(session: Session) -> list[PieceSpan]:
    timeline = session.timeline()
    assert timeline is not None
    return sorted(timeline.spans, key=lambda span: span.wait_begin_ms)


# offload -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("offload_kib", [1, 1200, 3000, 6000])
def test_offload_of_bytes_streams_at_least_them_and_less_than_one_piece_more(
    offload_kib: int,
) -> None:
    session = ready(offload=f"{offload_kib}KiB")
    streamed = session.report().streamed_bytes
    assert offload_kib * KIB <= streamed < offload_kib * KIB + max(piece_bytes(session))
    assert streamed == sum(piece_bytes(session)) == sum(s.bytes for s in last_spans(session))


def test_offload_of_more_bytes_than_there_are_streams_all() -> None:
    session = ready(offload="1GB")
    assert session.report().streamed_bytes == block_bytes(make_stack())
    assert leaf_names(session, resident=True) == set()


@pytest.mark.parametrize("count", range(NUM_BLOCKS + 1))
def test_offload_of_a_count_streams_so_many_blocks_whole_and_no_other(count: int) -> None:
    session = ready(offload=count)
    streamed = blocks_of(leaf_names(session, resident=False))
    resident = blocks_of(leaf_names(session, resident=True))
    assert len(streamed) == count
    assert resident == ALL_BLOCKS - streamed


class TwoLists(nn.Module):
    """Two stacks' blocks, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer_blocks = make_stack().blocks
        self.single_transformer_blocks = make_stack(seed=1).blocks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in [*self.transformer_blocks, *self.single_transformer_blocks]:
            x = block(x)
        return x


def test_offload_per_list_streams_so_many_blocks_of_each_list() -> None:
    session = attach_ready(TwoLists(), X, offload={"transformer_blocks": 4})
    assert len(blocks_of(leaf_names(session, resident=False))) == 4
    session.detach()
    counts = {"transformer_blocks": 1, "single_transformer_blocks": 5}
    session = attach_ready(TwoLists(), X, offload=counts)
    streamed = blocks_of(leaf_names(session, resident=False))
    assert sum(name.startswith("transformer_blocks") for name in streamed) == 1
    assert sum(name.startswith("single_transformer_blocks") for name in streamed) == 5


# vram --------------------------------------------------------------------------------------------


def test_vram_bounds_the_pool_and_more_of_it_keeps_more() -> None:
    reports = [ready(vram=f"{mib}MiB").report() for mib in (4, 6, 8, 64)]
    for report in reports:
        assert report.cap_bytes is not None
        assert report.pool_bytes <= report.cap_bytes
        assert report.pool_bytes >= report.resident_bytes + report.ring_bytes
    resident = [report.resident_bytes for report in reports]
    assert resident == sorted(set(resident))
    assert reports[-1].streamed_bytes == 0


def test_vram_below_the_smallest_plan_is_refused_with_its_parts() -> None:
    with pytest.raises(CapError, match=r"smallest plan needs .* cap is 512.*raise vram"):
        attach(make_stack(), vram="512KiB")


def test_vram_that_cannot_hold_what_is_pinned_is_refused() -> None:
    with pytest.raises(CapError):
        attach_ready(make_stack(), X, vram="4MiB", priorities={"blocks.*": "pin"})


# swap_space, block_size, mode --------------------------------------------------------------------


@pytest.mark.parametrize("swap_kib", [640, 1100, 3000])
def test_swap_space_is_the_size_of_the_ring(swap_kib: int) -> None:
    report = ready(offload="1GB", swap_space=f"{swap_kib}KiB").report()
    assert swap_kib * KIB - LARGEST_LEAF_BYTES < report.ring_bytes <= swap_kib * KIB


@pytest.mark.parametrize(
    ("options", "most"),
    [
        ({"offload": "1GB", "swap_space": "600KiB"}, 600 * KIB),
        ({"mode": "layerwise"}, 1.5 * LARGEST_LEAF_BYTES),
    ],
    ids=["swap_space", "layerwise"],
)
def test_no_step_has_a_larger_ring_not_even_the_first(options: dict[str, Any], most: float) -> None:
    model = make_stack()
    with attach(model, **options) as session:
        for _ in range(10):
            model(make_input())
            assert LARGEST_LEAF_BYTES <= session.report().ring_bytes <= most


def test_swap_space_below_the_largest_leaf_is_refused_naming_the_minimum() -> None:
    model = make_stack()
    with pytest.raises(ConfigError, match=r"514\.0 KiB") as refused:
        attach(model, offload="1GB", swap_space="100KiB")
    assert "100.0 KiB" in str(refused.value)
    assert "blocks.0.up" in str(refused.value)


def test_block_size_bounds_pieces_down_to_single_leaves() -> None:
    small = ready(offload="1GB", block_size="300KiB")
    assert all(len(piece) == 1 for piece in leaves_by_piece(small, resident=False))
    large = ready(offload="1GB", block_size="1600KiB")
    assert MIB < max(piece_bytes(large)) <= 1600 * KIB
    assert len(piece_bytes(large)) < len(piece_bytes(small)) == 18


def test_layerwise_streams_single_leaves_and_modules_outside_the_blocks() -> None:
    session = ready(mode="layerwise")
    streamed = leaf_names(session, resident=False)
    assert "out" in streamed
    assert len(streamed) == 19
    assert "inp" not in streamed  # code asks the first parameter for the model's device
    assert all(len(piece) == 1 for piece in leaves_by_piece(session, resident=False))
    assert session.report().ring_bytes <= 1.5 * LARGEST_LEAF_BYTES


def test_adaptive_streams_only_the_blocks() -> None:
    assert leaf_names(ready(offload="1GB"), resident=False).isdisjoint({"inp", "out"})


def test_chunkwise_packs_pieces_of_the_block_size() -> None:
    session = ready(offload="1GB", mode="chunkwise", block_size="2MiB")
    sizes = piece_bytes(session)
    assert len(sizes) < 18
    assert MIB < max(sizes) <= 2 * MIB


def test_chunkwise_without_block_size_uses_its_own_large_one() -> None:
    assert len(piece_bytes(ready(offload="1GB", mode="chunkwise"))) == 1


# lookahead, copy_streams, throttle ---------------------------------------------------------------


def fetched_early(session: Session) -> list[bool]:
    """Whether each piece's copy began before the piece before it had run."""
    spans = last_spans(session)
    return [b.copy_begin_ms < a.run_end_ms for a, b in pairwise(spans)]


def test_lookahead_0_copies_when_a_piece_is_used() -> None:
    session = ready(offload="1GB", lookahead=0, block_size="300KiB")
    assert not any(fetched_early(session))
    assert all(span.wait_begin_ms >= span.copy_end_ms for span in last_spans(session))


def test_lookahead_none_fetches_as_far_ahead_as_the_ring_allows() -> None:
    session = ready(offload="1GB", swap_space="3MiB", block_size="300KiB")
    assert all(fetched_early(session))


def test_lookahead_1_fetches_at_most_one_block_ahead() -> None:
    session = ready(offload="1GB", lookahead=1, swap_space="6MiB", block_size="300KiB")
    spans = last_spans(session)
    starts = {span.block: span.wait_begin_ms for span in reversed(spans)}
    for span in spans:
        index = int(span.block.rpartition(".")[2])
        if index >= 2:  # those of the first blocks are fetched in the step before
            assert span.copy_begin_ms >= starts[f"blocks.{index - 2}"]
    far = ready(offload="1GB", swap_space="6MiB", block_size="300KiB")
    spans = last_spans(far)
    starts = {span.block: span.wait_begin_ms for span in reversed(spans)}
    assert any(s.copy_begin_ms < starts["blocks.3"] for s in spans if s.block == "blocks.5")


def test_copy_streams_reach_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    make = _C.Engine

    def engine(device: object, streams: int, check: bool) -> Any:
        asked.append(streams)
        return make(device, streams, check)

    monkeypatch.setattr("blockswap.model_state._C.Engine", engine)
    ready(offload="1GB", copy_streams=3)
    ready(offload="1GB")
    assert asked == [3, 1]


def test_throttle_slows_the_link_that_is_planned_with() -> None:
    report = ready(offload="1GB", throttle=0.05).report()
    assert report.throttle_gb_per_s == 0.05
    assert report.predicted_ms is not None
    assert report.predicted_ms >= report.streamed_bytes / 0.05e6
    free = ready(offload="1GB").report()
    assert free.throttle_gb_per_s is None
    assert free.predicted_ms is not None
    if free.idle_link_gb_per_s > 0.1:
        assert free.predicted_ms < report.predicted_ms


# priorities, blocks, check -----------------------------------------------------------------------


@pytest.mark.parametrize("index", range(NUM_BLOCKS))
def test_pinned_block_stays_on_the_device(index: int) -> None:
    session = ready(offload="5MiB", priorities={f"blocks.{index}": "pin"})
    assert f"blocks.{index}" not in blocks_of(leaf_names(session, resident=False))


def test_pinned_leaves_stay_by_pattern() -> None:
    streamed = leaf_names(ready(offload="1MiB", priorities={"*.up": "pin"}), resident=False)
    assert streamed
    assert not any(name.endswith(".up") for name in streamed)


@pytest.mark.parametrize("index", range(NUM_BLOCKS))
def test_block_of_priority_0_goes_first(index: int) -> None:
    session = ready(offload=1, priorities={"*": 5, f"blocks.{index}": 0})
    assert blocks_of(leaf_names(session, resident=False)) == {f"blocks.{index}"}


def test_explicit_blocks_are_the_only_ones() -> None:
    session = ready(offload="1GB", blocks=["blocks.1", "blocks.4"])
    assert blocks_of(leaf_names(session, resident=False)) == {"blocks.1", "blocks.4"}


@pytest.mark.parametrize("check", [True, False])
def test_check_poisons_what_was_released(check: bool) -> None:
    model = make_stack()
    slots: list[torch.Tensor] = []
    poisoned: list[bool] = []
    model.blocks[2].mix.register_forward_hook(lambda m, *_: slots.append(m.bias.data))
    model.blocks[3].norm.register_forward_pre_hook(
        lambda *_: poisoned.append(bool(slots[-1].isnan().all()))
    )
    attach_ready(model, X, offload="1GB", lookahead=0, block_size="300KiB", check=check)
    steps(model, X)  # lookahead 0: nothing is copied over the slot before it is looked at
    assert poisoned[-1] is check


def test_environment_gives_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLOCKSWAP_OFFLOAD", "2")
    assert len(blocks_of(leaf_names(ready(), resident=False))) == 2
    monkeypatch.setenv("BLOCKSWAP_OFFLOAD", "")
    assert leaf_names(ready(), resident=False) == set()
