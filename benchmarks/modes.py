"""What block size and mode are good for: `python -m benchmarks.modes --help`.

Qwen-Image over a link of 25 GB/s: three profiles of cap, block size and mode side by side, the
three modes under one cap, and the lowest cap under which each mode can be attached and run. The
rows named "verdict" say whether peaks, times, copies and caps lie in the order that they should.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import blockswap
from benchmarks import command_line, write_rows
from blockswap.bench import zoo
from blockswap.bench.head import make_head
from blockswap.bench.rows import Row, measure, one_line, smallest_ring_bytes
from blockswap.bench.timing import Resident, measure_resident
from blockswap.room import cap_margin_bytes
from blockswap.sizes import format_bytes

GB = 10**9
MB = 10**6
KIND: zoo.Kind = "qwen"
FULL_WEIGHT_BYTES = 40_860_802_176  # a smaller model gets caps and blocks smaller by as much
TINY_LAYERS = 24  # a cap of less than some MiB holds nothing
LINK_GB_PER_S = 25.0
CAP_BYTES = 16 * 2**30
LAYERWISE = "layerwise"
MODES: dict[str, dict[str, Any]] = {
    LAYERWISE: {"mode": LAYERWISE},
    "chunkwise": {"mode": "chunkwise", "block_size": 2**26},  # its default, to be made smaller
    "adaptive": {"mode": "adaptive"},
}
PROFILES: dict[str, dict[str, Any]] = {
    "A balanced": {"vram": 16 * GB, "block_size": 300 * MB, "mode": "adaptive"},
    "B memory": {"vram": 14 * GB, "block_size": 200 * MB, "mode": "layerwise"},
    "C speed": {"vram": 18 * GB, "block_size": 500 * MB, "mode": "chunkwise"},
}
AS_FAST = 1.01
TRIES = 4
# The caps' check comes before the fourth forward: the first one traces, two more are timed.
FORWARDS_OF_A_TRY = 5


@dataclass
class Lowest:
    """The lowest cap of a mode, between two that were tried.

    Attributes:
        fails_at_bytes: the highest cap that was tried in vain; None: none was.
        runs_at_bytes: the lowest cap that was tried with success; None: none was.
        tries: each cap with what was said there; "" where all went well.
    """

    fails_at_bytes: int | None = None
    runs_at_bytes: int | None = None
    tries: list[tuple[int, str]] = field(default_factory=list)

    def note(self, cap: int, refusal: str) -> None:
        """Note a try."""
        self.tries.append((cap, refusal))
        if refusal:
            self.fails_at_bytes = (
                cap if self.fails_at_bytes is None else max(cap, self.fails_at_bytes)
            )
        else:
            self.runs_at_bytes = cap if self.runs_at_bytes is None else min(cap, self.runs_at_bytes)


def find_lowest(
    try_cap: Callable[[int], str], low: int, high: int, tries: int, starts_low: bool
) -> Lowest:
    """Bisect for the lowest cap that works.

    Args:
        try_cap: returns why a cap does not work, or "".
        low: believed to fail.
        high: believed to work; where it fails, further ones as far above are tried.
        tries: how many at most.
        starts_low: whether to try ``low`` itself first.
    """
    found = Lowest()
    width = high - low
    if starts_low:
        found.note(low, try_cap(low))
    while len(found.tries) < tries and (
        found.runs_at_bytes is None or found.runs_at_bytes - low > 1
    ):
        if found.runs_at_bytes is None:
            cap, high = high, high + width
        else:
            cap = (low + found.runs_at_bytes) // 2
        found.note(cap, try_cap(cap))
        low = max(low, found.fails_at_bytes or 0)
    return found


def bracket(row: Row, largest: int) -> tuple[int, int]:
    """Return between which caps the lowest one lies, from the row of the mode under a larger cap.

    Below the first, tensors and the smallest ring do not fit; above the second, all that PyTorch
    reserved does, and what is kept free besides.
    """
    if not row["peak_device_bytes"]:  # a CPU counts nothing
        return largest, row["weight_bytes"]
    weights = row["resident_bytes"] + row["ring_bytes"]
    low = row["peak_allocated_bytes"] - weights + largest
    high = row["peak_device_bytes"] - weights + largest
    return low, high + 2 * cap_margin_bytes(row["cap_bytes"])


def told(error: Exception) -> str:
    """Return what an error says, in one line."""
    return f"{type(error).__name__}: {str(error).splitlines()[0]}"


def is_rising(values: Sequence[float], slack: float = 1.0) -> bool:
    """Whether each is at most so many times the next; without slack, each is less."""
    pairs = itertools.pairwise(values)
    return all(a < b if slack == 1.0 else a <= slack * b for a, b in pairs)


def judge_profiles(rows: dict[str, Row]) -> Row:
    """Say whether less memory costs time and more saves it, as the profiles promise."""
    a, b, c = (rows[name] for name in PROFILES)
    peaks = [row["peak_device_bytes"] for row in (b, a, c)]
    times = [row["step_ms"] for row in (c, a, b)]
    return {
        "peak_b_a_c_bytes": peaks,
        "peak_rises_b_a_c": is_rising(peaks),
        "step_c_a_b_ms": times,
        "time_rises_c_a_b": is_rising(times, AS_FAST),
    }


def judge_modes(rows: dict[str, Row]) -> Row:
    """Say whether larger pieces make fewer copies and no slower step.

    Copies depend on which pieces stay, too, and so on measured times: a plan that keeps the small
    ones streams fewer. How many pieces there are depends on the mode alone.
    """
    pieces = {mode: row["num_pieces"] for mode, row in rows.items()}
    copies = {mode: row["copies_per_step"] for mode, row in rows.items()}
    times = {mode: row["step_ms"] for mode, row in rows.items()}
    return {
        "num_pieces": pieces,
        "layerwise_has_more_pieces": pieces[LAYERWISE] > pieces["chunkwise"],
        "copies_per_step": copies,
        "layerwise_has_more_copies": copies[LAYERWISE] > copies["chunkwise"],
        "step_ms": times,
        "chunkwise_is_as_fast": is_rising([times["chunkwise"], times[LAYERWISE]], AS_FAST),
    }


def judge_lowest(lowest: dict[str, Lowest]) -> Row:
    """Say whether no mode runs where layerwise does not."""
    layerwise = lowest[LAYERWISE]
    if layerwise.runs_at_bytes is None:
        return {"layerwise_is_lowest": False}
    bound = (
        layerwise.runs_at_bytes - 1
        if layerwise.fails_at_bytes is None
        else layerwise.fails_at_bytes
    )
    caps = [one.runs_at_bytes for mode, one in lowest.items() if mode != LAYERWISE]
    return {"layerwise_is_lowest": all(cap is None or cap > bound for cap in caps)}


def judged(name: str, judge: Callable[[dict[str, Row]], Row], rows: dict[str, Row]) -> Row:
    """Return the verdict on rows, none of which was refused."""
    refused = [which for which, row in rows.items() if row["status"] != "ok"]
    verdict = {"status": f"refused: {', '.join(refused)}"} if refused else judge(rows)
    return {"verdict": name} | verdict


class Modes:
    """One model in host memory, under one setting after the other.

    Args:
        size: "full" or "tiny".
        steps: how many to time.
        device: where it runs.
    """

    def __init__(self, size: str, steps: int, device: str) -> None:
        dtype = torch.bfloat16 if device != "cpu" else torch.float32
        fewer = {"num_layers": TINY_LAYERS} if size == "tiny" else {}
        self._model: nn.Module = zoo.build(KIND, size, dtype, device, 0, **fewer)  # type: ignore[arg-type]
        self._inputs = zoo.make_inputs(KIND, self._model, device, dtype, 1)
        self._resident: Resident = measure_resident(self._model, self._inputs, steps)
        self._model.to("cpu")
        self._steps = steps
        weights = sum(p.nbytes for p in self._model.parameters())
        self._scale = 1.0 if size == "full" else weights / FULL_WEIGHT_BYTES

    def profiles(self) -> Iterator[Row]:
        """Yield a row per profile and the verdict."""
        rows = {}
        for name, options in PROFILES.items():
            rows[name] = {"profile": name} | self._measure(options)
            yield rows[name]
        yield judged("profiles", judge_profiles, rows)

    def modes(self) -> Iterator[Row]:
        """Yield a row per mode under one cap, one per mode's lowest cap, and the verdicts."""
        rows = {}
        for mode in MODES:
            rows[mode] = {"mode": mode} | self._measure({"vram": CAP_BYTES} | MODES[mode])
            yield rows[mode]
        yield judged("modes", judge_modes, rows)
        lowest: dict[str, Lowest] = {}
        for mode, row in rows.items():
            if row["status"] == "ok":
                lowest[mode] = self._lowest(mode, row, lowest.get(LAYERWISE))
                yield {"lowest_cap": mode} | asdict(lowest[mode])
        if len(lowest) == len(rows):
            yield {"verdict": "lowest cap"} | judge_lowest(lowest)

    def _lowest(self, mode: str, row: Row, layerwise: Lowest | None) -> Lowest:
        """Search for a mode's lowest cap.

        Another mode begins where layerwise failed, or where it ran if it never did: what differs
        between brackets by rounding says nothing.
        """
        low, high = bracket(row, smallest_ring_bytes(self._model, mode == LAYERWISE))
        start = layerwise and (layerwise.fails_at_bytes or layerwise.runs_at_bytes)
        low = start or low

        def try_cap(cap: int) -> str:
            return self._try(mode, cap)

        return find_lowest(try_cap, low, max(high, low + 1), TRIES, starts_low=bool(start))

    def _measure(self, options: dict[str, Any]) -> Row:
        given = self._scaled(options) | {"throttle": LINK_GB_PER_S}
        try:
            row = measure(self._model, self._inputs, self._resident, given, self._steps)
            row["holds"] = row["peak_device_bytes"] <= row["cap_bytes"]
        except (blockswap.BlockswapError, torch.OutOfMemoryError) as error:
            row = {"engine": "blockswap", "settings": given, "status": told(error)}
        print(one_line(row), flush=True)
        return row

    def _scaled(self, options: dict[str, Any]) -> dict[str, Any]:
        return {
            name: max(1, int(value * self._scale)) if isinstance(value, int) else value
            for name, value in options.items()
        }

    def _try(self, mode: str, cap: int) -> str:
        """Return why some forwards cannot be run under a cap, or ""; at the link's own speed."""
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        try:
            with blockswap.attach(self._model, vram=cap, **self._scaled(MODES[mode])):
                for _ in range(FORWARDS_OF_A_TRY):
                    output = self._model(**self._inputs)[0]
        except (blockswap.BlockswapError, torch.OutOfMemoryError) as error:
            refusal = told(error)
        else:
            refusal = "" if torch.equal(output, self._resident.output) else "other bits"
        print(f"{mode} under {format_bytes(cap)}: {refusal or 'runs'}", flush=True)
        return refusal


@torch.no_grad()
def run(size: str, steps: int, parts: Sequence[str], device: str) -> Iterator[Row]:
    """Yield the rows of the named parts as soon as they are known."""
    modes = Modes(size, steps, device)
    for part in parts:
        for row in {"profiles": modes.profiles, "modes": modes.modes}[part]():
            if not {"settings", "lowest_cap"} & set(row):
                print(json.dumps(row), flush=True)
            yield {"model": KIND} | row


def main() -> None:
    """Run what the command line names."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--size", default="full", choices=["full", "tiny"])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--part", default="", choices=["", "profiles", "modes"], help="not both")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parts = [options.part] if options.part else ["profiles", "modes"]
    rows = run(options.size, options.steps, parts, device)
    write_rows(rows, make_head(command_line(sys.argv)), options.out)


if __name__ == "__main__":
    main()
