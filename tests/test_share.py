"""PyTorch's limit is the cap's rest while something computes, and the user's own otherwise."""

from __future__ import annotations

import gc
import itertools
import weakref
from typing import Any

import pytest
import torch
from interrupting import OURS, is_interrupted

from blockswap import memory
from blockswap.device_memory import DeviceMemory
from blockswap.share import Share

MIB = 2**20
TOTAL = 1000 * MIB


class Limited:
    """A device whose PyTorch may reserve `share` of its memory, in whole bytes."""

    numbers = itertools.count(100)

    def __init__(self, share: float = 1.0, total: int | None = TOTAL) -> None:
        self.key = ("test", next(self.numbers))
        self.share, self.total = share, total

    def limited_bytes(self) -> int | None:
        return self.total

    def limit(self) -> float:
        return self.share

    def set_limit(self, share: float) -> None:
        self.share = int(share * TOTAL) / TOTAL


def share_of(device: Any, cap: int | None) -> Share:
    return Share(device, cap)


def test_pytorch_may_reserve_what_the_cap_leaves_and_then_what_it_might_before() -> None:
    device = Limited(0.9)
    share = share_of(device, 400 * MIB)
    share.impose(beside_bytes=150 * MIB)
    assert device.share == 0.25
    share.impose(beside_bytes=50 * MIB)  # residents were shed meanwhile
    assert device.share == 0.35
    share.lift()
    assert device.share == 0.9
    share.lift()
    assert device.share == 0.9


@pytest.mark.parametrize("name", ["impose", "lift"])
@pytest.mark.parametrize("lifts", [False, True])
def test_what_is_interrupted_anywhere_is_made_good_by_the_next_lift(name: str, lifts: bool) -> None:
    at, was_interrupted = 1, True
    while was_interrupted:
        device = Limited(0.9)
        share = share_of(device, 400 * MIB)
        if name == "lift":
            share.impose(0)
        act = share.lift if name == "lift" else lambda share=share: share.impose(0)
        was_interrupted = is_interrupted(act, at, within=OURS + "share.py")
        if lifts:
            share.lift()
            assert device.share == 0.9
            device.share = 0.8  # the user's own now
        share.impose(100 * MIB)
        assert device.share == 0.3
        share.lift()
        assert device.share == (0.8 if lifts else 0.9)
        at += 1
    assert at > 5


def test_a_share_that_goes_away_while_another_is_lifted_takes_its_limit_along() -> None:
    device = Limited(0.9)
    shares = [share_of(device, cap * MIB) for cap in (300, 400)]
    shares[0].impose(0)
    shares[1].impose(0)
    tell = device.set_limit

    def collect_first(limit: float) -> None:
        del shares[1:]
        tell(limit)

    device.set_limit = collect_first  # type: ignore[method-assign]
    shares[0].lift()
    assert device.share == 0.9


def test_sessions_in_several_threads_leave_the_users_limit() -> None:
    device = Limited(0.9)
    first, second = share_of(device, 400 * MIB), share_of(device, 300 * MIB)
    first.impose(0)
    second.impose(0)
    assert device.share == 0.3
    first.lift()
    assert device.share == 0.3
    second.lift()
    assert device.share == 0.9


def test_a_share_that_goes_away_takes_its_limit_along() -> None:
    device = Limited(0.9)
    share = share_of(device, 400 * MIB)
    share.impose(0)
    del share
    gc.collect()
    assert device.share == 0.9


def test_the_limit_of_a_device_keeps_nobodys_memory() -> None:
    device = Limited()
    seen = weakref.ref(device)
    share = share_of(device, 400 * MIB)
    share.impose(0)
    share.lift()
    del share, device
    gc.collect()
    assert seen() is None


def test_the_users_limit_does_not_drift() -> None:
    device = Limited()
    device.set_limit(0.777777777777)
    before = device.share
    share = share_of(device, 400 * MIB)
    for _ in range(1000):
        share.impose(0)
        share.lift()
    assert device.share == before


def test_a_limit_that_the_user_sets_between_forwards_counts() -> None:
    device = Limited(0.9)
    share = share_of(device, 400 * MIB)
    share.impose(0)
    share.lift()
    device.set_limit(0.5)
    share.impose(0)
    share.lift()
    assert device.share == 0.5


def test_a_lower_limit_of_the_user_stays() -> None:
    device = Limited(0.1)
    share = share_of(device, 400 * MIB)
    share.impose(0)
    assert device.share == 0.1


def test_a_cap_that_others_fill_leaves_pytorch_nothing_not_less() -> None:
    device = Limited()
    share = share_of(device, 400 * MIB)
    share.impose(500 * MIB)
    assert device.share == 0.0


@pytest.mark.parametrize(("cap", "total"), [(None, TOTAL), (400 * MIB, None)])
def test_without_a_cap_or_a_known_device_nothing_is_limited(
    cap: int | None, total: int | None
) -> None:
    device = Limited(0.5, total)
    share = share_of(device, cap)
    share.impose(0)
    assert device.share == 0.5
    share.lift()
    assert device.share == 0.5


def test_under_install_the_limit_is_the_pools(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[int] = []

    class Pool:
        def set_limit(self, num_bytes: int) -> None:
            limits.append(num_bytes)

    monkeypatch.setattr(memory, "_installed", True)
    monkeypatch.setattr(memory, "_limits", {})
    monkeypatch.setattr(memory, "_pool_of", lambda _: Pool())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (0, TOTAL))
    device = DeviceMemory(torch.device("cuda", 0))
    assert device.limit() == 1.0
    device.set_limit(0.25)
    device.set_limit(1.0)
    assert limits == [TOTAL // 4, 2**63 - 1]
    memory.set_limit(0, TOTAL // 2)
    assert device.limit() == 0.5
