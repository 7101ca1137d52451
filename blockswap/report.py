"""What a session did, in numbers: `session.report()` and `session.timeline()` return these.

Fields carry their unit in the name; GB is 10^9 bytes (links), GiB is 2^30 (memory). None means
not known (yet): nothing is ever estimated in silence.
"""

from __future__ import annotations

import dataclasses
import io
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rich.console import Console
from rich.table import Table

from blockswap.sizes import format_bytes
from blockswap.trace import make_trace, save_trace

State = Literal["learning", "ready", "paused", "detached"]

_MAX_STALL_ROWS = 8
_MIN_STALL_MS = 0.05  # less would be shown as 0.0
_WIDTH = 100


@dataclass(frozen=True)
class PieceSpan:
    """One piece in one step. Times are ms from the step's start.

    A copy may begin before 0: it was fetched ahead in the step before. A resident piece has
    copy_begin_ms == copy_end_ms. Its compute is [wait_end_ms, run_end_ms]; compute stood still in
    [wait_begin_ms, wait_end_ms].
    """

    piece: int
    name: str
    block: str
    bytes: int
    copy_begin_ms: float
    copy_end_ms: float
    wait_begin_ms: float
    wait_end_ms: float
    run_end_ms: float

    @property
    def copy_ms(self) -> float:
        """Time on the link."""
        return self.copy_end_ms - self.copy_begin_ms

    @property
    def stall_ms(self) -> float:
        """Time that compute waited for this piece's copy."""
        return self.wait_end_ms - self.wait_begin_ms


@dataclass(frozen=True)
class Timeline:
    """One step, piece by piece in execution order. Pieces without a span ran from residents.

    The bytes are those of the report: what was on the device beside the spans' pieces, and the ring
    that these passed through; None: not known.
    """

    step_ms: float
    spans: tuple[PieceSpan, ...]
    fixed_bytes: int = 0
    resident_bytes: int = 0
    ring_bytes: int | None = None

    @property
    def stall_ms(self) -> float:
        """Time that compute waited for copies, summed over the step."""
        return sum(span.stall_ms for span in self.spans)

    @property
    def link_busy_ms(self) -> float:
        """Time in which at least one copy ran; copies on several streams are not counted twice."""
        busy_ms, end_ms = 0.0, float("-inf")
        for begin, end in sorted((s.copy_begin_ms, s.copy_end_ms) for s in self.spans):
            busy_ms += max(0.0, end - max(begin, end_ms))
            end_ms = max(end_ms, end)
        return busy_ms

    @property
    def streamed_bytes(self) -> int:
        """Bytes that crossed the link for this step."""
        return sum(span.bytes for span in self.spans if span.copy_ms > 0)

    def to_trace(self) -> dict[str, Any]:
        """The step as Chrome trace events: copies, runs, stalls, and the weights on the device."""
        return make_trace(self)

    def save_trace(self, path: str | Path) -> None:
        """Writes `to_trace` as JSON: open it in https://ui.perfetto.dev or chrome://tracing."""
        save_trace(self, path)


class BlockStall(NamedTuple):
    """What one block cost in waiting, per step."""

    block: str
    stall_ms: float
    bytes: int  # streamed for it per step
    gb_per_s: float  # its copies' own speed; 0 when nothing was copied


@dataclass(frozen=True, kw_only=True)
class Report:
    """A session's memory, traffic and time. `print(report)` is for people, `to_json()` for scripts.

    Counts and bytes "per step" are of the last complete step.
    """

    model: str  # class name
    device: str
    state: State
    steps: int  # since attach
    # Memory, bytes.
    cap_bytes: int | None  # bound on peak_device_bytes in forwards; None: no cap
    weight_bytes: int  # all of the model
    leaf_bytes: int  # leaf modules of the blocks: what may stream
    resident_bytes: int
    ring_bytes: int
    fixed_bytes: int  # weights outside the blocks, always on the device
    activation_bytes: int | None  # learned peak of torch's share
    host_bytes: int  # homes in host memory
    pinned_bytes: int  # of those, of the bounce ring, and of what waits for its next turn
    bounce_bytes: int = 0  # the ring through which weights that are not pinned pass
    pool_bytes: int = 0  # small parameters, residents and ring, as allocated now
    peak_allocated_bytes: int | None = None  # pool + what PyTorch has allocated, since attach
    peak_device_bytes: int | None = None  # pool + what PyTorch has reserved, since attach
    # Traffic per step.
    streamed_bytes: int
    copies_per_step: int
    link_gb_per_s: float | None  # measured; None before the first copy
    idle_link_gb_per_s: float = 0.0  # 64 MiB copies on the idle link, at attach
    throttle_gb_per_s: float | None = None
    # Time, ms per step.
    step_ms: float | None = None
    stall_ms: float | None = None
    predicted_ms: float | None = None  # by simulation of the plan
    bound_ms: float | None = None  # max(compute, host, streamed bytes / link)
    overlap: float | None = None  # 1 - stall / link busy; 1 = all copies hidden
    # Events since attach.
    mispredicted: int = 0  # pieces that ran out of order
    refetched: int = 0  # pieces fetched again after an edit
    # Since attach: plans for less and for more memory, because it was taken or left; forwards that
    # PyTorch ended for lack of memory, and what was given up then, by the ladder's rungs.
    sheds: int = 0
    growths: int = 0
    ooms: int = 0
    ladder: dict[str, int] = dataclasses.field(default_factory=dict)
    # The plan.
    num_pieces: int = 0
    num_resident_pieces: int = 0
    stalls: tuple[BlockStall, ...] = ()  # per block, in execution order
    notes: tuple[str, ...] = ()  # modules kept whole and why, fallbacks
    explain: str = ""  # the plan's own text

    @property
    def bound_share(self) -> float | None:
        """bound_ms / step_ms: 1 is the best that any schedule of these bytes can do."""
        if not self.step_ms or self.bound_ms is None:
            return None
        return self.bound_ms / self.step_ms

    @property
    def advice(self) -> str:
        """The one change that would help most now, or why none would; empty before a full step."""
        if not self.step_ms or self.stall_ms is None:
            return ""
        if self.streamed_bytes == 0:
            return "All weights are on the device: no copy can cost time."
        if self.stall_ms < 0.03 * self.step_ms:
            return "Copies are hidden behind compute: a lower cap may cost nothing."
        gb_per_s = min(self.link_gb_per_s or 0.0, self.throttle_gb_per_s or float("inf"))
        link_ms = self.streamed_bytes / (gb_per_s * 1e6) if gb_per_s else 0.0
        if link_ms > 0.8 * self.step_ms:
            return (
                f"The link is the limit: it needs {link_ms:.1f} ms for "
                f"{format_bytes(self.streamed_bytes)}. A GiB more of cap saves up to "
                f"{2**30 / (gb_per_s * 1e6):.1f} ms."
            )
        return (
            "The link idles while compute waits: raise swap_space or lookahead, or leave both to "
            "the planner."
        )

    def to_dict(self) -> dict[str, Any]:
        """All fields and `bound_share`, in plain types."""
        fields = dataclasses.asdict(self)
        fields["stalls"] = [BlockStall(*stall)._asdict() for stall in self.stalls]
        fields["notes"] = list(self.notes)
        return fields | {"bound_share": self.bound_share}

    def to_json(self) -> str:
        """`to_dict` as indented JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        """Readable text; colours only where stdout is a terminal."""
        is_terminal = sys.stdout.isatty()
        console = Console(
            file=io.StringIO(),
            force_terminal=is_terminal,
            no_color=None if is_terminal else True,
            width=_WIDTH,
            highlight=False,
            legacy_windows=False,
        )
        title = f"{self.model} on {self.device}: {self.state}, {_count(self.steps, 'step')}"
        console.print(title, style="bold", markup=False)
        console.print(self._numbers_table())
        if any(stall_ms >= _MIN_STALL_MS for _, stall_ms, _, _ in self.stalls):
            console.print()
            console.print(_stall_table(self.stalls))
        if self.notes or self.advice:
            console.print()
        for note in self.notes:
            console.print(f"note: {note}", markup=False)
        if self.advice:
            console.print(self.advice, style="bold", markup=False)
        text = console.file.getvalue() if isinstance(console.file, io.StringIO) else ""
        return "\n".join(line.rstrip() for line in text.splitlines())

    def _numbers_table(self) -> Table:
        table = Table.grid(padding=(0, 3))
        table.add_column(style="dim")
        table.add_column(justify="right")
        table.add_column()
        for label, value, meaning in [*self._memory_rows(), *self._time_rows()]:
            table.add_row(label, value, meaning)
        return table

    def _memory_rows(self) -> Iterable[tuple[str, str, str]]:
        cap = "none" if self.cap_bytes is None else format_bytes(self.cap_bytes)
        peak = "" if not self.peak_device_bytes else format_bytes(self.peak_device_bytes)
        yield "cap", cap, f"peak so far {peak}" if peak else ""
        share = self.resident_bytes / self.leaf_bytes if self.leaf_bytes else 1.0
        pieces = f"{self.num_resident_pieces} of {_count(self.num_pieces, 'piece')}"
        yield (
            "resident",
            format_bytes(self.resident_bytes),
            f"{share:.0%} of {format_bytes(self.leaf_bytes)} in blocks; {pieces}",
        )
        yield "ring", format_bytes(self.ring_bytes), "streamed pieces pass through it"
        yield "fixed", format_bytes(self.fixed_bytes), "weights outside the blocks"
        if self.activation_bytes is not None:
            yield (
                "activations",
                format_bytes(self.activation_bytes),
                "learned peak of torch's share",
            )
        ring = f", {format_bytes(self.bounce_bytes)} of it a ring" if self.bounce_bytes else ""
        yield (
            "host",
            format_bytes(self.host_bytes),
            f"{format_bytes(self.pinned_bytes)} pinned{ring}",
        )
        if self.sheds or self.growths:
            changes = f"{_count(self.sheds, 'shed')}, {_count(self.growths, 'growth')}"
            yield "elastic", changes, "plans for memory that was taken or left"
        if self.ooms:
            rungs = ", ".join(f"{count} {rung}" for rung, count in self.ladder.items())
            yield "out of memory", _count(self.ooms, "forward"), f"ladder: {rungs or 'none left'}"

    def _time_rows(self) -> Iterable[tuple[str, str, str]]:
        copies = f"per step in {_count(self.copies_per_step, 'copy', 'copies')}"
        if self.link_gb_per_s is not None:
            copies += f" at {self.link_gb_per_s:.1f} GB/s"
        if self.throttle_gb_per_s is not None:
            copies += f" (throttled to {self.throttle_gb_per_s:g} GB/s)"
        yield "streamed", format_bytes(self.streamed_bytes), copies
        parts = [
            text.format(value)
            for text, value in (
                ("predicted {:.1f}", self.predicted_ms),
                ("bound {:.1f}", self.bound_ms),
                ("{:.0%} of it reached", self.bound_share),
            )
            if value is not None
        ]
        yield "step", _ms(self.step_ms), ", ".join(parts)
        hidden = "" if self.overlap is None else f"{self.overlap:.0%} of copy time hidden"
        yield "stall", _ms(self.stall_ms), hidden
        if self.mispredicted or self.refetched:
            text = f"{self.refetched} refetched after an edit"
            yield "out of order", _count(self.mispredicted, "piece"), text


def _stall_table(stalls: tuple[BlockStall, ...]) -> Table:
    """The blocks that cost most, worst first, and one row for the rest."""
    worst = sorted((BlockStall(*stall) for stall in stalls), key=lambda s: -s.stall_ms)
    worst = [stall for stall in worst if stall.stall_ms >= _MIN_STALL_MS]
    table = Table(box=None, padding=(0, 3, 0, 0), header_style="dim")
    table.add_column("waited for")
    for header in ("stall", "streamed", "GB/s"):
        table.add_column(header, justify="right")
    for stall in worst[:_MAX_STALL_ROWS]:
        speed = f"{stall.gb_per_s:.1f}" if stall.gb_per_s else ""
        table.add_row(stall.block, _ms(stall.stall_ms), format_bytes(stall.bytes), speed)
    rest = worst[_MAX_STALL_ROWS:]
    if rest:
        rest_ms, rest_bytes = sum(s.stall_ms for s in rest), sum(s.bytes for s in rest)
        blocks = _count(len(rest), "other block")
        table.add_row(blocks, _ms(rest_ms), format_bytes(rest_bytes), "", style="dim")
    return table


def _ms(value: float | None) -> str:
    return "not known yet" if value is None else f"{value:.1f} ms"


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number} {one}" if number == 1 else f"{number} {many or one + 's'}"
