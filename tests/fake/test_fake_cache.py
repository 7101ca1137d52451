"""The fake accelerator keeps what is freed as CUDA's caching allocator does, where a test wants it."""

from __future__ import annotations

import ctypes
import gc
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

MIB = 1 << 20


def take(num_bytes: int) -> torch.Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8, device="fake")


class Memory:
    """What is held beyond what was before."""

    def __init__(self, device_module) -> None:
        gc.collect()
        self.module = device_module
        self.base = device_module.memory_reserved()
        self.before = device_module.memory_stats_as_nested_dict()

    @property
    def used(self) -> int:
        return int(self.module.memory_allocated()) - self.base

    @property
    def reserved(self) -> int:
        return int(self.module.memory_reserved()) - self.base

    def counted(self, name: str) -> int:
        return int(self.module.memory_stats()[name] - self.before[name])


@pytest.fixture
def memory(device_module):
    with device_module.cached():
        yield Memory(device_module)


def test_what_is_freed_stays_reserved_until_the_cache_is_emptied(device_module, memory):
    free = device_module.mem_get_info()[0]
    x = take(16 * MIB)
    del x
    assert (memory.used, memory.reserved) == (0, 16 * MIB)
    assert free - device_module.mem_get_info()[0] == 16 * MIB
    x = take(16 * MIB)
    assert (memory.used, memory.reserved) == (16 * MIB, 16 * MIB), "it was given out again"
    device_module.empty_cache()
    assert memory.reserved == 16 * MIB
    del x
    torch.accelerator.empty_cache()
    assert memory.reserved == 0


@pytest.mark.parametrize(
    ("num_bytes", "segment"),
    [
        (1, 2 * MIB), (MIB, 2 * MIB), (MIB + 1, 20 * MIB), (10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB), (10 * MIB + 1, 12 * MIB), (33 * MIB, 34 * MIB),
    ],
)  # fmt: skip
def test_segments_have_the_sizes_of_cudas(memory, num_bytes, segment):
    x = take(num_bytes)  # noqa: F841
    assert memory.reserved == segment


def test_small_and_large_requests_do_not_share_a_segment(memory):
    x = take(MIB + 1)  # noqa: F841
    y = take(MIB)  # noqa: F841
    assert memory.reserved == 22 * MIB


def test_the_smallest_piece_that_is_large_enough_is_taken(device_module, memory):
    x, y = take(40 * MIB), take(20 * MIB)
    del x, y
    x = take(18 * MIB)  # noqa: F841
    sizes = sorted((n, free) for _, _, n, free in device_module.cached_pieces())
    assert sizes == [(2 * MIB, True), (18 * MIB, False), (40 * MIB, True)]


def test_what_is_left_of_a_piece_counts_as_used_where_it_is_too_little_to_be_one(memory):
    x = take(20 * MIB)
    del x
    x = take(19 * MIB)  # noqa: F841
    assert memory.used == 20 * MIB


def test_a_segment_goes_back_only_when_all_of_it_is_free(device_module, memory):
    parts = [take(4 * MIB) for _ in range(5)]
    assert memory.reserved == 20 * MIB
    while len(parts) > 1:
        parts.pop()
        device_module.empty_cache()
        assert (memory.used, memory.reserved) == (len(parts) * 4 * MIB, 20 * MIB)
    parts.clear()
    assert [p[2:] for p in device_module.cached_pieces()] == [(20 * MIB, True)], (
        "they are one again"
    )
    device_module.empty_cache()
    assert memory.reserved == 0


def test_a_piece_serves_the_stream_for_which_it_came(device_module, memory):
    x = take(16 * MIB)
    del x
    with device_module.stream(device_module.Stream()):
        x = take(16 * MIB)  # noqa: F841
    assert memory.reserved == 32 * MIB


@pytest.mark.parametrize("bound", ["the device", "PyTorch's share"])
def test_the_cache_is_given_back_where_a_request_would_pass_a_limit(device_module, memory, bound):
    if bound == "the device":
        device_module.set_limit(memory.base + 32 * MIB)
    else:
        device_module.set_limit(128 * (memory.base + 32 * MIB))
        device_module.set_per_process_memory_fraction(1 / 128)
    x, kept = take(12 * MIB), take(MIB)
    del x
    x = take(20 * MIB)
    assert (memory.used, memory.reserved) == (21 * MIB, 22 * MIB)
    assert (memory.counted("num_alloc_retries"), memory.counted("num_ooms")) == (1, 0)
    with pytest.raises(torch.OutOfMemoryError, match="in use"):
        take(12 * MIB)
    assert (memory.counted("num_alloc_retries"), memory.counted("num_ooms")) == (2, 1)
    del x, kept
    assert memory.reserved == 22 * MIB
    take(32 * MIB)
    assert (memory.reserved, memory.counted("num_ooms")) == (32 * MIB, 1)


def test_peaks_count_what_is_cached(device_module, memory):
    x, y = take(16 * MIB), take(32 * MIB)
    del x
    device_module.reset_peak_memory_stats()
    del y
    peaks = device_module.max_memory_allocated(), device_module.max_memory_reserved()
    assert [peak - memory.base for peak in peaks] == [32 * MIB, 48 * MIB]
    device_module.empty_cache()
    device_module.reset_peak_memory_stats()
    assert device_module.max_memory_reserved() == memory.base
    stats, nested = device_module.memory_stats(), device_module.memory_stats_as_nested_dict()
    for kind in ("allocated_bytes", "reserved_bytes"):
        for when in ("current", "peak"):
            assert stats[f"{kind}.all.{when}"] == nested[kind]["all"][when] == memory.base
            assert torch.accelerator.memory_stats()[f"{kind}.all.{when}"] == memory.base


def test_nothing_is_kept_behind_it(device_module):
    base = device_module.memory_reserved()
    with device_module.cached():
        x, y = take(4 * MIB), take(30 * MIB)
        del y
    assert device_module.memory_reserved() == base + 20 * MIB
    with device_module.cached():
        z = take(4 * MIB)  # of the same segment
    del x, z
    assert device_module.memory_reserved() == device_module.memory_allocated() == base
    assert device_module.cached_pieces() == []


def test_a_late_reader_of_what_was_given_out_again_finds_poison(device_module, memory):
    x = torch.zeros(16 * MIB, dtype=torch.uint8, device="fake")
    device_module.synchronize()
    address = x.data_ptr()
    del x
    torch.zeros(16 * MIB, dtype=torch.uint8, device="fake")
    device_module.synchronize()
    assert memory.reserved == 16 * MIB and ctypes.string_at(address, 4) == b"\xff" * 4


SIZES = st.one_of(
    st.integers(1, 2 * MIB), st.integers(1, 24).map(lambda n: n * MIB), st.sampled_from([512, MIB])
)
#: A size to take, which of those taken to free, or None: the cache is emptied.
ACTIONS = st.lists(
    st.one_of(SIZES.map(lambda n: ("take", n)), st.integers(0, 30).map(lambda n: ("free", n)),
              st.just(("empty", 0))),
    max_size=40,
)  # fmt: skip
LIMIT = 96 * MIB


def pieces_by_segment(device_module) -> dict[int, list[tuple[int, int, bool]]]:
    segments: dict[int, list[tuple[int, int, bool]]] = {}
    for segment, place, num_bytes, is_free in device_module.cached_pieces():
        segments.setdefault(segment, []).append((place, num_bytes, is_free))
    return segments


def check(device_module, memory: Memory, held: list[torch.Tensor], is_emptied: bool) -> None:
    segments = pieces_by_segment(device_module)
    in_use: list[int] = []
    reserved = 0
    for begin, pieces in segments.items():
        end = begin
        for place, num_bytes, _ in pieces:
            assert place == end, "pieces neither overlap nor leave a hole"
            end += num_bytes
        assert (end - begin) % (2 * MIB) == 0
        reserved += end - begin
        frees = [is_free for *_, is_free in pieces]
        assert not any(a and b for a, b in itertools.pairwise(frees)), "neighbours merge"
        assert not (is_emptied and all(frees)), "what is wholly free went back"
        in_use += [n for _, n, is_free in pieces if not is_free]
    assert memory.reserved == reserved <= LIMIT and memory.used == sum(in_use)
    wanted = sorted(-(-t.nbytes // 512) * 512 for t in held)
    assert len(in_use) == len(held)
    for asked, got in zip(wanted, sorted(in_use), strict=True):
        assert asked <= got <= asked + MIB


@given(actions=ACTIONS)
def test_the_books_balance_whatever_is_taken_and_freed(device_module, actions):
    with device_module.cached():
        memory = Memory(device_module)
        device_module.set_limit(memory.base + LIMIT)
        held: list[torch.Tensor] = []
        for action, n in actions:
            if action == "take":
                ooms = memory.counted("num_ooms")
                try:
                    held.append(take(n))
                except torch.OutOfMemoryError:
                    assert memory.counted("num_ooms") == ooms + 1
                    check(device_module, memory, held, is_emptied=True)
            elif action == "free" and held:
                del held[n % len(held)]
            elif action == "empty":
                device_module.empty_cache()
            check(device_module, memory, held, is_emptied=action == "empty")
        held.clear()
        device_module.empty_cache()
        assert (memory.used, memory.reserved) == (0, 0) and not device_module.cached_pieces()
    device_module.set_limit(None)
