"""Pairs each engine's row with ours at no more memory, and says who is faster. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from blockswap.bench.rows import GIB, MIB, Row

# Of the weights: an engine whose peak holds this much of them streams nothing in steady state.
KEEPS_ALL = 0.97
AS_FAST = 1.01  # for engines that keep all weights
WORTH_A_ROW = GIB  # between our smallest plan and everything resident

Kind = Literal["streams", "in use", "below our smallest", "keeps all"]


@dataclass(frozen=True)
class Comparison:
    """One engine's row, and ours to set against it.

    Attributes:
        model: which.
        engine, settings: the other's.
        step_ms, peak_bytes: the other's; its peak is of what PyTorch has allocated.
        our_step_ms, our_peak_bytes: ours.
        device_bytes, our_device_bytes: what each took of the device at most: the same with what
            PyTorch reserves, such as memory that other streams still use.
        shortest_ms, our_shortest_ms: of the steps that were timed.
        over_twin, our_over_twin: of engines that keep all weights, the step over that of an
            unhooked twin in the same seconds; 0: there was none.
        in_use_bytes: the other's peak of what is allocated and what was freed while another stream
            still used it.
        kind: "streams": ours peaks no higher; "in use": ours peaks no higher than what the other
            has in use, although less is allocated; "below our smallest": the other needs less than
            our smallest plan, which is set against it; "keeps all": it holds all weights.
    """

    model: str
    engine: str
    settings: dict[str, Any]
    step_ms: float
    peak_bytes: int
    our_step_ms: float
    our_peak_bytes: int
    kind: Kind
    shortest_ms: float
    our_shortest_ms: float
    over_twin: float = 0.0
    our_over_twin: float = 0.0
    device_bytes: int = 0
    our_device_bytes: int = 0
    in_use_bytes: int = 0

    @property
    def gap_mib(self) -> float:
        """Return how much more ours needs; negative where it needs less."""
        return (self.our_peak_bytes - self.peak_bytes) / MIB

    @property
    def ratio(self) -> float:
        """Return its step over ours: above 1 ours is faster."""
        if self.over_twin and self.our_over_twin:
            return self.over_twin / self.our_over_twin
        return self.step_ms / self.our_step_ms

    @property
    def holds(self) -> bool:
        """Whether ours is faster; within 1 % where the other keeps all weights.

        There both run the same kernels, and the GPU's clocks move medians by more than that: what
        each took over a twin beside it counts, or, without one, the shortest steps. Nothing is
        faster than its twin but by chance.
        """
        if self.kind == "keeps all":
            if self.over_twin and self.our_over_twin:
                return self.our_over_twin <= AS_FAST * max(1.0, self.over_twin)
            return self.our_shortest_ms <= AS_FAST * self.shortest_ms
        return self.our_step_ms < self.step_ms


def caps_to_run(peers: Sequence[Row], smallest: Row, resident: Row) -> list[int]:
    """Return the caps under which ours is to run: what the other engines use, each once.

    Peaks within 1 % of each other share the lowest of them; those below our smallest plan and
    those of engines that keep all weights need none. Of a large model, one more cap lies midway,
    for the picture: what memory between the two ends buys.
    """
    kinds = ((row, _kind(row, smallest, resident)) for row in peers if row["status"] == "ok")
    peaks = sorted(_most(row, kind) for row, kind in kinds if kind in ("streams", "in use"))
    caps: list[int] = []
    for peak in peaks:
        if not caps or peak > 1.01 * caps[-1]:
            caps.append(peak)
    if _peak(resident) - _peak(smallest) < WORTH_A_ROW:
        return caps
    return [*caps, (_peak(smallest) + _peak(resident)) // 2]


def compare(rows: Sequence[Row]) -> list[Comparison]:
    """Return one comparison for each other engine's row of one model.

    Args:
        rows: of one model: the resident one, the other engines', and ours; our smallest plan is the
            one with the lowest peak.
    """
    fine = [row for row in rows if row["status"] == "ok"]
    ours = [row for row in fine if row["engine"] == "blockswap"]
    resident = next((row for row in fine if row["engine"] == "resident"), None)
    if not ours or resident is None:
        return []
    smallest = min(ours, key=_peak)
    found = []
    for row in fine:
        if row["engine"] in ("blockswap", "resident"):
            continue
        kind = _kind(row, smallest, resident)
        best = _rival(row, ours, smallest, kind)
        found.append(
            Comparison(
                row["model"],
                row["engine"],
                row["settings"],
                row["step_ms"],
                _peak(row),
                best["step_ms"],
                _peak(best),
                kind,
                _shortest(row),
                _shortest(best),
                _over_twin(row) if kind == "keeps all" else 0.0,
                _over_twin(best) if kind == "keeps all" else 0.0,
                row.get("peak_device_bytes", 0),
                best.get("peak_device_bytes", 0),
                _in_use(row),
            )
        )
    return found


def _kind(row: Row, smallest: Row, resident: Row) -> Kind:
    if _peak(row) >= KEEPS_ALL * _peak(resident):
        return "keeps all"
    if _peak(row) >= _peak(smallest):
        return "streams"
    return "in use" if _in_use(row) >= _peak(smallest) else "below our smallest"


def _rival(row: Row, ours: Sequence[Row], smallest: Row, kind: Kind) -> Row:
    if kind == "below our smallest":
        return smallest
    if kind in ("streams", "in use"):
        return min((r for r in ours if _peak(r) <= _most(row, kind)), key=_median)
    beside_twins = [r for r in ours if _over_twin(r)] if _over_twin(row) else []
    return min(beside_twins, key=_over_twin) if beside_twins else min(ours, key=_shortest)


def _most(row: Row, kind: Kind) -> int:
    """Return how much of the device ours may take beside such a row."""
    return _peak(row) if kind == "streams" else _in_use(row)


def _in_use(row: Row) -> int:
    return int(row.get("peak_active_bytes", _peak(row)))


def _over_twin(row: Row) -> float:
    """Return the step over its twin's; 0 when there was none."""
    return float(row["step_ms"] / row["twin_ms"]) if row.get("twin_ms") else 0.0


def _median(row: Row) -> float:
    return float(row["step_ms"])


def _shortest(row: Row) -> float:
    return float(row["step_ms_min"] if "step_ms_min" in row else row["step_ms"])


def _peak(row: Row) -> int:
    return int(row["peak_allocated_bytes"])
