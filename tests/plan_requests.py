"""Requests for the planner's tests: from piece lists, from the measured models, at random."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from hypothesis import strategies as st
from plan_reference import PieceList

from blockswap import _C

MIB = 2**20
MODELS = ("flux", "qwen", "sdxl", "wan")
CAPS = (0.03, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
LINK = 55.3e9


def request_of(pieces: PieceList, **fields):
    """One leaf and one block per piece."""
    leaves = [
        _C.Leaf(name=f"blocks.{i}", bytes=b, seconds=s, block=i)
        for i, (b, s) in enumerate(zip(pieces.bytes, pieces.seconds, strict=True))
    ]
    fields.setdefault("piece_bytes", 1)
    fields.setdefault("budget_bytes", pieces.budget_bytes)
    return _C.PlanRequest(
        leaves=leaves,
        blocks=[_C.Block(name=f"blocks.{i}", list="blocks") for i in range(len(leaves))],
        link=_C.Link(
            bytes_per_second=pieces.bytes_per_second, seconds_per_copy=pieces.seconds_per_copy
        ),
        **fields,
    )


@cache
def measured(model: str) -> tuple[tuple[str, int, float], ...]:
    """Leaves of a measured model: name, bytes, seconds, scaled to the step on the GPU alone."""
    path = Path(__file__).parent / "costs" / f"costs-{model}.json"
    costs = json.loads(path.read_text())
    scale = costs["gpu_ms"] / 1e3 / sum(leaf["seconds"] for leaf in costs["leaves"])
    return tuple(
        (leaf["name"], -(-leaf["bytes"] // 256) * 256, leaf["seconds"] * scale)
        for leaf in costs["leaves"]
    )


def measured_request(model: str, share: float, **fields):
    """A measured model with a budget of `share` of its weights, blocks as its names say."""
    leaves, blocks, index = [], [], {}
    for name, size, seconds in measured(model):
        block = ".".join(name.split(".")[:2])
        if block not in index:
            index[block] = len(blocks)
            blocks.append(_C.Block(name=block, list=block.split(".")[0]))
        leaves.append(_C.Leaf(name=name, bytes=size, seconds=seconds, block=index[block]))
    fields.setdefault("budget_bytes", int(share * sum(leaf.bytes for leaf in leaves)))
    link = _C.Link(bytes_per_second=LINK, seconds_per_copy=8e-6)
    return _C.PlanRequest(leaves=leaves, blocks=blocks, link=link, **fields)


def measured_pieces(model: str, share: float) -> PieceList:
    leaves = measured(model)
    sizes = [size for _, size, _ in leaves]
    return PieceList(sizes, [s for _, _, s in leaves], int(share * sum(sizes)), LINK)


@st.composite
def any_request(draw, max_leaves: int = 40):
    """Leaves, blocks, priorities, pins and wishes of every kind; may be impossible."""
    n = draw(st.integers(1, max_leaves))
    sizes = draw(st.lists(st.integers(1, 2000), min_size=n, max_size=n))
    times = draw(st.lists(st.sampled_from([0.0, 1e-6, 1e-5, 1e-4, 7e-4]), min_size=n, max_size=n))
    issue = draw(st.sampled_from([0.0, 0.0, 3e-6, 3e-5]))
    tails = draw(st.lists(st.sampled_from([0.0, 0.0, 0.1, 0.9, 1.0]), min_size=n, max_size=n))
    priorities = draw(
        st.lists(
            st.sampled_from([_C.NO_PRIORITY] * 5 + [0, 1, 2, _C.PINNED]), min_size=n, max_size=n
        )
    )
    use_priorities = draw(st.booleans())
    per_block = draw(st.integers(1, 6))
    num_blocks = -(-n // per_block)
    leaves = [
        _C.Leaf(
            name=f"leaf{i}",
            bytes=256 * sizes[i],
            seconds=times[i],
            tail_seconds=tails[i] * times[i],
            host_seconds=issue * (1 + i % 3),
            block=i // per_block,
            priority=priorities[i] if use_priorities else _C.NO_PRIORITY,
        )
        for i in range(n)
    ]
    blocks = [
        _C.Block(name=f"b{i}", list="front" if i < num_blocks // 2 else "back")
        for i in range(num_blocks)
    ]
    total = sum(leaf.bytes for leaf in leaves)
    fields = {"budget_bytes": draw(st.one_of(st.just(-1), st.integers(0, total + 1000)))}
    wish = draw(st.sampled_from(["none", "none", "bytes", "blocks", "all blocks"]))
    if wish == "bytes":
        fields["offload_bytes"] = draw(st.integers(0, total))
    elif wish == "blocks":
        fields["offload_blocks"] = [(blocks[-1].list, draw(st.integers(0, num_blocks)))]
    elif wish == "all blocks":
        fields["offload_blocks"] = [("", draw(st.integers(0, num_blocks)))]
    if draw(st.booleans()):
        fields["ring_bytes"] = 256 * draw(st.integers(1, 5000))
    return _C.PlanRequest(
        leaves=leaves,
        blocks=blocks,
        link=_C.Link(bytes_per_second=draw(st.sampled_from([1e8, 1e9, 2e10]))),
        head_seconds=draw(st.sampled_from([0.0, 1e-4])),
        host_seconds=draw(st.sampled_from([0.0, 0.0, 5e-3])),
        host_seconds_per_copy=draw(st.sampled_from([0.0, 0.0, 1e-5])),
        piece_bytes=draw(st.sampled_from([0, 0, 1, 64 * 1024, MIB])),
        lookahead=draw(st.sampled_from([-1, -1, 0, 1, 2, 5])),
        **fields,
    )
