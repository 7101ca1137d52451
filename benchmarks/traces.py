"""What the allocators' benchmark replays: steps that are made up, and forwards that were recorded.

PyTorch records what its allocator does. Of that, tensors that came and went make a trace; what was
there before, such as weights, plays no part.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from blockswap.bench import zoo

SHAPES = ((4096, 3072), (4608, 3072), (1536, 3072), (8192, 1536), (2304, 5120))  # tokens, width
NUM_BLOCKS = 24
UNRECORDED_FORWARDS = 2  # load kernels and take workspaces that stay
MOST_ENTRIES = 2_000_000


class Trace:
    """Rows (slot, bytes) of allocations and, with 0 bytes, frees; all is freed at its end."""

    def __init__(self, scale: float = 1.0) -> None:
        self.rows: list[tuple[int, int]] = []
        self._scale = scale
        self._free_slots: list[int] = []
        self._num_slots = 0

    def take(self, num_bytes: float) -> int:
        """Allocate; return the slot."""
        if not self._free_slots:
            self._free_slots.append(self._num_slots)
            self._num_slots += 1
        slot = self._free_slots.pop()
        self.rows.append((slot, max(1, int(num_bytes * self._scale))))
        return slot

    def drop(self, *slots: int) -> None:
        """Free."""
        for slot in slots:
            self.rows.append((slot, 0))
            self._free_slots.append(slot)

    def as_tensor(self) -> torch.Tensor:
        """Return the rows as the replay takes them."""
        return torch.tensor(self.rows, dtype=torch.int64)


def run_block(trace: Trace, tokens: int, width: int, draw: random.Random) -> None:
    """Allocate what one transformer block in bfloat16 does: modulation, attention, MLP."""
    row = 2.0 * width
    modulation = [trace.take(row) for _ in range(6)]
    statistics = trace.take(8.0 * tokens)
    normed = trace.take(tokens * row)
    heads = [trace.take(tokens * row) for _ in range(3)]
    trace.drop(normed, statistics)
    rotated = [trace.take(tokens * row) for _ in range(2)]
    trace.drop(*heads[:2])
    workspace = trace.take(draw.choice((2**20, 4 * 2**20, 32 * 2**20)))
    attended = trace.take(tokens * row)
    trace.drop(*rotated, heads[2], workspace)
    projected = trace.take(tokens * row)
    trace.drop(attended)
    hidden = trace.take(4 * tokens * row)
    activated = trace.take(4 * tokens * row)
    trace.drop(hidden)
    out = trace.take(tokens * row)
    trace.drop(activated, projected, out, *modulation)


def make_trace(num_steps: int, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    """Return the rows of steps whose shapes change from one to the next."""
    draw = random.Random(seed)
    trace = Trace(scale)
    for _ in range(num_steps):
        tokens, width = draw.choice(SHAPES)
        stream = trace.take(2.0 * tokens * width)
        embeddings = [trace.take(draw.randrange(1000, 400_000)) for _ in range(12)]
        for _ in range(NUM_BLOCKS):
            run_block(trace, tokens, width, draw)
        trace.drop(stream, *embeddings)
    return trace.as_tensor()


def rows_of(entries: Iterable[Mapping[str, Any]]) -> list[tuple[int, int]]:
    """Return what PyTorch recorded of one device as rows.

    The replay knows one stream: blocks of all streams are taken and freed on it. A block is free
    when that was asked for; that other streams still used it then (``free_completed`` comes later)
    is left out. So is what became of whole segments.

    Args:
        entries: of ``device_traces``, in order.
    """
    trace = Trace()
    slots: dict[int, int] = {}  # by address
    for entry in entries:
        if entry["action"] == "alloc":
            if entry["addr"] in slots:  # its free was not recorded
                trace.drop(slots.pop(entry["addr"]))
            slots[entry["addr"]] = trace.take(entry["size"])
        elif entry["action"] == "free_requested" and entry["addr"] in slots:
            trace.drop(slots.pop(entry["addr"]))
    trace.drop(*slots.values())
    return trace.rows


def num_streams(entries: Iterable[Mapping[str, Any]]) -> int:
    """Return on how many streams blocks were allocated."""
    return len({entry["stream"] for entry in entries if entry["action"] == "alloc"})


@torch.no_grad()
def record_forwards(kind: str, size: str, forwards: int) -> list[dict[str, Any]]:
    """Return what PyTorch's allocator did in forwards of a resident model on the GPU."""
    model = zoo.build(kind, size, torch.bfloat16, "cuda", 0)  # type: ignore[arg-type]
    inputs = zoo.make_inputs(kind, model, "cuda", torch.bfloat16, 1)  # type: ignore[arg-type]
    for _ in range(UNRECORDED_FORWARDS):
        model(**inputs)
    torch.cuda.synchronize()
    # Neither Python's frames nor C++ ones: a snapshot would have to name them all.
    torch.cuda.memory._record_memory_history(
        "all", context=None, stacks="python", max_entries=MOST_ENTRIES
    )
    for _ in range(forwards):
        model(**inputs)
    torch.cuda.synchronize()
    traces = torch.cuda.memory._snapshot()["device_traces"]
    torch.cuda.memory._record_memory_history(None)
    entries: list[dict[str, Any]] = traces[torch.cuda.current_device()]
    del model, inputs
    gc.collect()
    # What cuBLAS keeps would leave holes in segments for the replay to find.
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    return entries
