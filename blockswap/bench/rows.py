"""One streamed model, measured: a row of the result schema."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

import blockswap
from blockswap.bench.timing import Resident, timed_steps
from blockswap.blocks import find_blocks
from blockswap.pieces import find_leaves, image_bytes
from blockswap.report import Report
from blockswap.session import Session

WARM_STEPS = 2
MAX_LEARNING_STEPS = 30
MIB = 2**20
GIB = 2**30

Row = dict[str, Any]
# Times a model that streams: ms of each step, the output, and the resident model to compare with.
Timer = Callable[[nn.Module, Session], tuple[list[float], Any, Resident]]


def measure(
    model: nn.Module,
    inputs: dict[str, Any],
    resident: Resident,
    options: dict[str, Any],
    steps: int,
    *,
    beside: int = 0,
    timer: Timer | None = None,
    around: AbstractContextManager[None] | None = None,
) -> Row:
    """Attach under one setting, learn, time, detach; return the row.

    ``learning_s`` is the host's time for the first steps, until the plan was settled.

    Args:
        model: in host memory.
        inputs: on the device.
        resident: the same model unhooked.
        options: of `blockswap.attach`.
        steps: how many to time.
        beside: bytes on the device that are not the model's; a cap is raised by them.
        timer: other than ``steps`` steps in a row.
        around: entered once the model is attached.
    """
    given = dict(options)
    if "vram" in given:
        given["vram"] += beside
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    begin = time.perf_counter()
    session = blockswap.attach(model, **given)
    setup_s = time.perf_counter() - begin
    try:
        with around or nullcontext():
            begin = time.perf_counter()
            for _ in range(MAX_LEARNING_STEPS):
                model(**inputs)
                if session.state == "ready":
                    break
            learning_s, learning_steps = time.perf_counter() - begin, session.report().steps
            timed_steps(model, inputs, WARM_STEPS)
            predicted_ms = session.report().predicted_ms  # fixed before the timed steps
            if timer is None:
                times, output = timed_steps(model, inputs, steps)
            else:
                times, output, resident = timer(model, session)
            report = session.report()
            identical = torch.equal(output, resident.output)
    finally:
        session.detach()
    row = _make_row(resident, report, beside, times, predicted_ms)
    row |= {"learning_s": learning_s, "learning_steps": learning_steps}
    return row | {"settings": options, "setup_s": setup_s, "bit_identical": identical}


def _make_row(
    resident: Resident,
    report: Report,
    beside: int,
    times: list[float],
    predicted_ms: float | None,
) -> Row:
    step_ms = statistics.median(times)
    link = report.throttle_gb_per_s or report.idle_link_gb_per_s
    peak_allocated_bytes = (report.peak_allocated_bytes or beside) - beside
    needed_ms = (resident.peak_allocated_bytes - peak_allocated_bytes) / link / 1e6
    frontier_ms = max(resident.step_ms, needed_ms)
    return {
        "engine": "blockswap",
        "settings": {},
        "status": "ok",
        "cap_bytes": None if report.cap_bytes is None else report.cap_bytes - beside,
        "peak_device_bytes": (report.peak_device_bytes or beside) - beside,
        "peak_allocated_bytes": peak_allocated_bytes,
        "peak_host_bytes": report.host_bytes,
        "weight_bytes": report.weight_bytes,
        "leaf_bytes": report.leaf_bytes,
        "resident_bytes": report.resident_bytes,
        "ring_bytes": report.ring_bytes,
        "streamed_bytes": report.streamed_bytes,
        "link_bytes": report.streamed_bytes,
        "link_gb_per_s": link,
        "resident_ms": resident.step_ms,
        "busy_resident_ms": resident.busy_step_ms,
        "resident_peak_device_bytes": resident.peak_device_bytes,
        "resident_peak_allocated_bytes": resident.peak_allocated_bytes,
        "frontier_ms": frontier_ms,
        "law_ms": resident.step_ms + report.streamed_bytes / link / 1e6,
        "predicted_ms": predicted_ms,
        "step_ms": step_ms,
        "step_ms_min": min(times),
        "step_ms_max": max(times),
        "stall_ms": report.stall_ms,
        "efficiency": frontier_ms / step_ms,
        "num_pieces": report.num_pieces,
        "copies_per_step": report.copies_per_step,
        "mispredicted": report.mispredicted,
        "ooms": report.ooms,
    }


def smallest_ring_bytes(model: nn.Module, include_outside: bool = False) -> int:
    """Return the largest leaf as it lies on the device: no ring may be smaller."""
    leaves = find_leaves(model, find_blocks(model), include_outside)
    return max(image_bytes(p for _, p in leaf.parameters) for leaf in leaves.streamable)


def one_line(row: Row) -> str:
    """Return a row for the eye."""
    if row["status"] != "ok":
        return f"{row['engine']} {row['settings']}: {row['status']}"
    busy = row.get("busy_resident_ms")
    text = (
        f"{row['engine']} {row['settings']}: {row['step_ms']:.2f} ms, peak"
        f" {row['peak_allocated_bytes'] / GIB:.3f} GiB, setup {row['setup_s']:.1f} s, identical"
        f" {row['bit_identical']}"
    )
    if row["engine"] != "blockswap":
        return text
    return (
        f"{text}; predicted {row['predicted_ms'] or 0:.2f}, resident {row['resident_ms']:.2f}"
        f"{f' ({busy:.2f} beside copies)' if busy else ''}, frontier {row['frontier_ms']:.2f},"
        f" efficiency {row['efficiency']:.4f}, streamed {row['streamed_bytes'] / GIB:.2f} GiB, ring"
        f" {row['ring_bytes'] / MIB:.0f} MiB, {row['copies_per_step']}/{row['num_pieces']} pieces,"
        f" stall {row['stall_ms'] or 0:.1f} ms"
    )
