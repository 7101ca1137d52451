"""References for the planner, written apart from csrc: an event simulator and a slow search.

Nothing here shares a line or an idea of representation with the product: the simulator works on
byte ranges (it never reads ``Piece.after`` unless asked to), the search is plan_reference.cpp.
"""

from __future__ import annotations

import ctypes
import functools
import os
import random
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple


class PieceList(NamedTuple):
    """Pieces with their costs, a budget and a link: all that a search needs."""

    bytes: list[int]
    seconds: list[float]
    budget_bytes: int
    bytes_per_second: float
    seconds_per_copy: float = 8e-6


@functools.cache
def _library() -> ctypes.CDLL:
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        raise RuntimeError("the reference search needs a C++ compiler: install g++ or set CXX")
    source = Path(__file__).with_name("plan_reference.cpp")
    target = Path(tempfile.mkdtemp(prefix="plan_reference_")) / "plan_reference.so"
    command = [compiler, "-O2", "-std=c++17", "-shared", "-fPIC", "-o", str(target), str(source)]
    subprocess.run(command, check=True)
    library = ctypes.CDLL(str(target))
    library.reference_seconds.restype = ctypes.c_double
    return library


def reference_seconds(
    pieces: PieceList,
    *,
    floating: bool = False,
    num_starts: int = 20,
    max_failures: int = 5000,
    seed: int = 0,
) -> float:
    """Best step found, in seconds: all subsets of up to 14 pieces, else climbs at random."""
    n = len(pieces.bytes)
    return _library().reference_seconds(
        n,
        (ctypes.c_int64 * n)(*pieces.bytes),
        (ctypes.c_double * n)(*pieces.seconds),
        ctypes.c_int64(pieces.budget_bytes),
        ctypes.c_double(pieces.bytes_per_second),
        ctypes.c_double(pieces.seconds_per_copy),
        int(floating),
        num_starts,
        max_failures,
        ctypes.c_uint64(seed),
    )


def overlap(a, b) -> bool:
    """Whether two pieces' slots share bytes."""
    return a.slot_offset < b.slot_offset + b.bytes and b.slot_offset < a.slot_offset + a.bytes


class Replay(NamedTuple):
    """What happened in a replay, seconds from the beginning; keys are (step, piece)."""

    copy_begin: dict
    copy_end: dict
    run_begin: dict
    run_end: dict
    released: dict
    step_seconds: float


def replay(plan, request, *, steps: int = 40, honour_after: bool = True) -> Replay:
    """Event by event: copies leave in order; each waits for every earlier user of its bytes.

    With ``honour_after`` a copy starts when its ``after`` piece was released (what the engine
    does); without, when the bytes themselves are free. Raises AssertionError naming piece, range
    and step when a copy would overwrite a piece that has not run.
    """
    link = request.link
    pieces, leaves = plan.pieces, request.leaves
    streamed = [i for i, piece in enumerate(pieces) if not piece.resident]
    copy_begin, copy_end, run_begin, run_end = {}, {}, {}, {}
    released: dict = {}
    queue = [(s, i) for s in range(steps) for i in streamed]
    fetched = 0
    link_free = now = host = 0.0
    ends = []

    def last_users(step: int, i: int):
        """Every earlier run whose bytes this copy overwrites, nearest first."""
        seen = 0
        position = streamed.index(i)
        for back in range(1, len(streamed) + 1):
            j = streamed[position - back]
            s = step if back <= position else step - 1
            if s < 0:
                return
            if overlap(pieces[j], pieces[i]):
                seen += 1
                yield s, j

    def allowed_at(step: int, i: int) -> float | None:
        """When the copy may start; None while what it waits for has not run yet."""
        if honour_after:
            after = pieces[i].after
            key = (step if after < i else step - 1, after)
            if key[0] < 0:
                return 0.0
            moment = released.get(key)
            if moment is None:
                return None
            for s, j in last_users(step, i):
                assert released.get((s, j), moment + 1) <= moment, (
                    f"step {step}: the copy of piece {i} into "
                    f"[{pieces[i].slot_offset}, {pieces[i].slot_offset + pieces[i].bytes}) may "
                    f"start before piece {j} of step {s} at {pieces[j].slot_offset} has run"
                )
            return moment
        moments = [released.get(key) for key in last_users(step, i)]
        return None if None in moments else max(moments, default=0.0)

    for step in range(steps):
        host += request.host_seconds
        now = max(now + request.head_seconds, host)
        for i, piece in enumerate(pieces):
            if not piece.resident:
                host += request.host_seconds_per_copy
                while fetched < len(queue):
                    s, j = queue[fetched]
                    allowed = allowed_at(s, j)
                    if allowed is None:
                        break
                    if plan.copy_on_compute:
                        if (s, j) != (step, i):
                            break
                        allowed = max(allowed, now)
                    begin = max(allowed, link_free)
                    end = begin + pieces[j].bytes / link.bytes_per_second + link.seconds_per_copy
                    copy_begin[s, j], copy_end[s, j] = begin, end
                    link_free = end
                    fetched += 1
                assert (step, i) in copy_end, f"step {step}: piece {i} is never fetched"
                now = max(now, copy_end[step, i])
            run_begin[step, i] = now
            for leaf in leaves[piece.first_leaf : piece.end_leaf]:
                host += leaf.host_seconds
                now = max(now + leaf.seconds, host)  # no sooner over than issued
            run_end[step, i] = now
            # Its bytes are free once its last leaf has run: what follows that leaf does not read them.
            last = leaves[piece.end_leaf - 1]
            released[step, i] = max(run_begin[step, i], now - last.tail_seconds)
        ends.append(now)
    period = min(12, steps - 1)
    seconds = (ends[-1] - ends[-1 - period]) / period if steps > 1 else ends[0]
    return Replay(copy_begin, copy_end, run_begin, run_end, released, seconds)


def random_list(seed: int, smallest: int, largest: int) -> PieceList:
    """Piece lists of several characters: even, periodic, wildly uneven; link- to compute-bound."""
    rng = random.Random(seed)
    n = rng.randint(smallest, largest)
    character = rng.randrange(4)
    if character == 0:
        sizes = [256 * rng.randint(1, 400_000) for _ in range(n)]
    elif character == 1:
        kinds = [256 * rng.randint(10_000, 400_000) for _ in range(rng.randint(1, 4))]
        pattern = [rng.choice(kinds) for _ in range(rng.randint(1, 8))]
        sizes = [pattern[i % len(pattern)] for i in range(n)]
    elif character == 2:
        sizes = [256 * int(10 ** rng.uniform(2, 5.6)) for _ in range(n)]
    else:
        sizes = [256 * 100_000] * n
    speed = rng.choice([12e9, 25e9, 55e9])
    compute = sum(sizes) / speed * 10 ** rng.uniform(-1, 0.6)
    shape = rng.randrange(3)
    weights = [
        rng.random() if shape == 0 else 10 ** rng.uniform(-2, 0) if shape == 1 else 1.0
        for _ in range(n)
    ]
    if rng.random() < 0.3:  # like a UNet: the outer pieces compute long
        for i in range(max(1, n // 6)):
            weights[i] *= 10
            weights[-1 - i] *= 10
    seconds = [w / sum(weights) * compute for w in weights]
    biggest = max(sizes)
    budget = int(biggest + (sum(sizes) - biggest) * rng.uniform(0.0, 0.95))
    return PieceList(sizes, seconds, budget, speed)
