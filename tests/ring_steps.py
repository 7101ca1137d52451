"""Steps through a ring, simulated piece by piece: what timelines, and the bytes they tell of, are.

All times are whole ms, so that sums and differences of them are exact. A fetch waits until the
pieces that its bytes displace are released, and the piece itself in the step before.
"""

from __future__ import annotations

from typing import NamedTuple

from hypothesis import strategies

from blockswap.report import PieceSpan, Timeline

NUM_STEPS = 12


class Piece(NamedTuple):
    bytes: int
    copy_ms: int
    run_ms: int


class Stay(NamedTuple):
    """A piece's bytes in the ring, in ms from the first step's begin."""

    bytes: int
    begin_ms: float
    end_ms: float


class Steps(NamedTuple):
    ring_bytes: int
    begins_ms: list[float]  # of each step
    timelines: list[Timeline]
    stays: list[Stay]

    def held_bytes(self, ms: float) -> int:
        """What the ring holds at a moment."""
        return sum(s.bytes for s in self.stays if s.begin_ms <= ms < s.end_ms)


def run_steps(pieces, ring_bytes, pause_ms=0, head_ms=0, num_links=1, num_steps=NUM_STEPS) -> Steps:
    """Runs all pieces in each step.

    Args:
        pieces: in the order in which they run; none larger than the ring.
        ring_bytes: size of the ring.
        pause_ms: between two steps.
        head_ms: compute at a step's begin, before its first piece.
        num_links: copies that may run at once.
    """
    now_ms, links_ms = 0.0, [0.0] * num_links
    begins_ms, timelines, stays = [], [], []
    for _ in range(num_steps):
        begin_ms, spans = now_ms, []
        now_ms += head_ms
        for index, piece in enumerate(pieces):
            room_ms = stays[-len(pieces)].end_ms if len(stays) >= len(pieces) else 0.0
            behind_bytes = piece.bytes
            for stay in reversed(stays):
                behind_bytes += stay.bytes
                if behind_bytes > ring_bytes:
                    room_ms = max(room_ms, stay.end_ms)
                    break
            link = len(stays) % num_links
            # Fetches are issued in order.
            copy_begin_ms = max(links_ms[link], room_ms, stays[-1].begin_ms if stays else 0.0)
            links_ms[link] = copy_end_ms = copy_begin_ms + piece.copy_ms
            wait_end_ms = max(now_ms, copy_end_ms)
            moments = (copy_begin_ms, copy_end_ms, now_ms, wait_end_ms, wait_end_ms + piece.run_ms)
            now_ms = moments[-1]
            stays.append(Stay(piece.bytes, copy_begin_ms, now_ms))
            block = f"blocks.{index // 2}"
            from_begin = [ms - begin_ms for ms in moments]
            spans.append(PieceSpan(index, f"{block}.ff.{index}", block, piece.bytes, *from_begin))
        begins_ms.append(begin_ms)
        timelines.append(
            Timeline(now_ms - begin_ms, tuple(spans), 3000, 40_000, ring_bytes=ring_bytes)
        )
        now_ms += pause_ms
    return Steps(ring_bytes, begins_ms, timelines, stays)


@strategies.composite
def any_steps(draw, max_pause_ms=0, max_links=1) -> Steps:
    """Steps of random pieces through a random ring."""
    ms = strategies.integers(1, 9)
    piece = strategies.builds(Piece, strategies.integers(1, 100), ms, ms)
    pieces = draw(strategies.lists(piece, min_size=1, max_size=8))
    ring_bytes = draw(strategies.integers(max(p.bytes for p in pieces), 400))
    return run_steps(
        pieces,
        ring_bytes,
        pause_ms=draw(strategies.integers(0, max_pause_ms)),
        head_ms=draw(strategies.integers(0, 5)),
        num_links=draw(strategies.integers(1, max_links)),
    )
