"""The link's speed: what plans count on, and what the engine is told."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from blockswap.host import Host
from blockswap.link import PROBE_BYTES, Link

GB = 1e9
MEASURED = 50 * GB


class Engine:
    """Remembers what the link was slowed to; 0: full speed."""

    def __init__(self) -> None:
        self.throttled: list[tuple[float, float]] = []
        self.probed_bytes = 0

    def throttle(self, speed: float, measured: float) -> None:
        self.throttled.append((speed, measured))

    def measure_link(
        self, _image: tuple[int, bool], _target: int, num_bytes: int, _repeats: int, _token: object
    ) -> float:
        self.probed_bytes = num_bytes
        return MEASURED


class Pool:
    """Gives what is asked for."""

    def __init__(self) -> None:
        self.held: set[int] = set()

    def allocate(self, num_bytes: int, _token: object) -> int:
        self.held.add(num_bytes)
        return num_bytes

    def free(self, address: int) -> None:
        self.held.remove(address)

    def give_back(self) -> int:
        return 0


def measured(
    throttle: float | None = None,
    room: int | None = None,
    ring: int = 2**25,
    chunk: int = 2**30,
) -> tuple[Link, Engine]:
    engine = Engine()
    link = Link(cast("Any", SimpleNamespace(engine=engine)), throttle)
    arena = SimpleNamespace(
        bytes=2**30, address=4096, is_pinned=lambda *_: True, chunk_end=lambda _: chunk
    )
    host = SimpleNamespace(arena=arena)
    pool = Pool()
    link.measure(cast("Host", host), cast("Any", pool), torch.empty(0), room, ring, True)
    assert not pool.held
    return link, engine


def test_without_a_throttle_the_link_runs_at_full_speed() -> None:
    link, engine = measured()
    assert link.speed == link.measured == MEASURED
    assert engine.throttled == [(0.0, MEASURED)]


@pytest.mark.parametrize(("asked", "speed"), [(25.0, 25 * GB), (80.0, MEASURED)])
def test_a_throttle_bounds_the_speed_but_not_what_was_measured(asked: float, speed: float) -> None:
    link, engine = measured(asked)
    assert (link.speed, link.measured) == (speed, MEASURED)
    assert engine.throttled == [(speed, MEASURED)]


def test_a_real_step_teaches_no_speed_beyond_the_throttle() -> None:
    link, _ = measured(25.0)
    link.learn(48 * GB)
    assert link.speed == 25 * GB


def test_the_measurement_keeps_to_the_room_that_a_cap_leaves() -> None:
    assert measured(room=2**20)[1].probed_bytes == 2**20
    assert measured()[1].probed_bytes == PROBE_BYTES


def test_the_measurement_takes_no_more_than_the_smallest_ring_where_nothing_is_left() -> None:
    assert measured(room=0, ring=300_000)[1].probed_bytes == 300_000
    assert measured(room=0)[1].probed_bytes == 2**20


def test_the_measurement_crosses_no_end_of_a_chunk_that_was_pinned_apart() -> None:
    assert measured(chunk=2**24)[1].probed_bytes == 2**24


@pytest.mark.parametrize("throttle", [None, 25.0])
def test_copies_are_slowed_below_the_throttle_and_back_again(throttle: float | None) -> None:
    link, engine = measured(throttle)
    usual, asked = engine.throttled[0], (throttle or 50) * GB
    link.slow_down(2.0)
    assert engine.throttled[-1] == (asked / 2, MEASURED)
    link.slow_down(1.0)
    assert engine.throttled[-1] == usual


def test_copies_outlast_a_host_that_set_the_pace_and_no_other() -> None:
    link, engine = measured()
    link.outlast(host_seconds=0.1, step_seconds=0.101, num_bytes=int(5 * GB))
    assert engine.throttled[-1] == (MEASURED / 2, MEASURED)
    link.outlast(host_seconds=0.02, step_seconds=0.4, num_bytes=int(5 * GB))
    assert engine.throttled[-1] == (0.0, MEASURED)


def test_a_link_whose_speed_is_unknown_is_not_slowed() -> None:
    link, engine = measured()
    link.speed = 0.0
    link.outlast(host_seconds=0.1, step_seconds=0.1, num_bytes=int(5 * GB))
    assert engine.throttled[-1] == (0.0, MEASURED)
