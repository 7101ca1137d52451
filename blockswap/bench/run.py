"""Runs the engines side by side: one process, one model, one after the other."""

from __future__ import annotations

import contextlib
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from blockswap.bench import zoo
from blockswap.bench.compare import KEEPS_ALL, Comparison, caps_to_run, compare
from blockswap.bench.core import quiet_core
from blockswap.bench.engines import PEERS, RESIDENT, Engine
from blockswap.bench.head import make_head
from blockswap.bench.request import MIN_STEPS, BenchRequest
from blockswap.bench.rows import Row, measure, one_line, smallest_ring_bytes
from blockswap.bench.timing import (
    UNTIMED_STEPS,
    Resident,
    measure_resident,
    peaks,
    reset_peaks,
    timed_steps,
)
from blockswap.bench.twin import (
    bytes_on_gpu,
    fresh,
    place_twin,
    steps_in_turns,
    time_beside_twin,
)
from blockswap.errors import BlockswapError, CapError, ConfigError
from blockswap.files import whole_file
from blockswap.progress import Progress
from blockswap.session import Session

Say = Callable[[str, str], None]
# Engines without asynchronous copies need ten seconds and more for a large model's step.
SLOW_STEP_S, TIMED_S = 1.0, 15.0
# What engines were seen to raise on models or memory that they cannot handle.
ENGINE_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,  # and out of memory
    TypeError,
    ValueError,
)


def run_bench(request: BenchRequest, say: Say, command: str) -> list[Comparison]:
    """Measure, and write the result file after each row.

    Args:
        request: what to measure.
        say: called with a label and a line of text for each thing done.
        command: for the result's head.
    """
    engines = request.chosen_engines()
    missing = [engine.name for engine in PEERS if not engine.is_installed]
    if missing and request.device != "cpu":
        say("missing", f"{', '.join(missing)}: not installed, left out")
    result: dict[str, Any] = make_head(command) | {"rows": []}
    comparisons: list[Comparison] = []
    with torch.no_grad():
        for kind in request.models:
            rows = []
            for row in _rows_of(kind, request, engines):
                rows.append({"model": kind} | row)
                result["rows"].append(rows[-1])
                with whole_file(request.out) as part:
                    part.write_text(json.dumps(result, indent=1, default=str) + "\n", "utf-8")
                say(kind, one_line(rows[-1]))
            comparisons += compare(rows)
            gc.collect()
    return comparisons


def _rows_of(kind: zoo.Kind, request: BenchRequest, engines: Sequence[Engine]) -> Iterator[Row]:
    device = torch.device(request.device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    with Progress(f"building {kind}", 1, "steps"):
        draw_on = None if request.size == "tiny" else device
        model = zoo.build(kind, request.size, dtype, "cpu", 0, draw_on=draw_on)
    inputs = zoo.make_inputs(kind, model, device, dtype, 1)
    _clean_up()
    try:
        resident, row = _run_resident(model, inputs, request.steps, device)
    except torch.OutOfMemoryError:
        raise ConfigError(
            f"{kind} does not fit whole on {request.device}, and there is nothing to compare bits"
            " and speed with: choose another --model, or --size tiny"
        ) from None
    yield row
    smallest = _run_ours(model, inputs, resident, _smallest_options(model), request)
    yield smallest
    peers: list[Row] = []
    for engine in engines:
        for settings in engine.settings:
            peers.append(_run_engine(engine, settings, model, inputs, resident, request))
            yield peers[-1]
    options: list[dict[str, Any]] = [{"offload": 0}]
    if smallest["status"] == "ok":
        # Peaks are of what is allocated; a cap bounds what PyTorch keeps in fragments, too.
        fragments = smallest["peak_device_bytes"] - smallest["peak_allocated_bytes"]
        options += [{"vram": cap + fragments} for cap in caps_to_run(peers, smallest, row)]
    for each in options:
        yield _run_ours(model, inputs, resident, each, request)


def _smallest_options(model: nn.Module) -> dict[str, Any]:
    """Return the options of our smallest plan: everything streams through the smallest ring."""
    ring_bytes = smallest_ring_bytes(model, include_outside=True)
    return {"mode": "layerwise", "swap_space": f"{ring_bytes}B"}


def _run_resident(
    model: nn.Module, inputs: dict[str, Any], steps: int, device: torch.device
) -> tuple[Resident, Row]:
    begin = time.perf_counter()
    shell = fresh(model)
    RESIDENT.put(shell, device, {})
    setup_s = time.perf_counter() - begin
    with quiet_core():
        resident = measure_resident(shell, inputs, steps)
    del shell
    _clean_up()
    return resident, {
        "engine": RESIDENT.name,
        "settings": {},
        "status": "ok",
        "peak_device_bytes": resident.peak_device_bytes,
        "peak_allocated_bytes": resident.peak_allocated_bytes,
        "step_ms": resident.step_ms,
        "setup_s": setup_s,
        "bit_identical": True,
    }


def _run_engine(
    engine: Engine,
    settings: dict[str, Any],
    model: nn.Module,
    inputs: dict[str, Any],
    resident: Resident,
    request: BenchRequest,
) -> Row:
    """Return the row of another engine; what it raises becomes the row's status."""
    row: Row = {"engine": engine.name, "settings": settings}
    shell = fresh(model)
    with contextlib.ExitStack() as undone:
        undone.callback(_clean_up)
        try:
            begin = time.perf_counter()
            undone.callback(engine.put(shell, torch.device(request.device), settings))
            setup_s = time.perf_counter() - begin
            steps = _warm_up(shell, inputs, request.steps)
            reset_peaks()
            with quiet_core():
                times, output = timed_steps(shell, inputs, steps)
            most = peaks()
            of_twin: list[float] = []
            if 0 < KEEPS_ALL * resident.peak_allocated_bytes <= most.allocated:
                beside = time_beside_twin(shell, model, inputs, resident, request.device, steps)
                if beside is not None:
                    times, of_twin, output = beside
        except ENGINE_ERRORS as error:  # the others still run
            return row | {"status": f"failed: {type(error).__name__}: {str(error)[:200]}"}
        finally:
            del shell
        return (
            row
            | {
                "status": "ok",
                "peak_device_bytes": most.reserved,
                "peak_active_bytes": most.active,
                "peak_allocated_bytes": most.allocated,
                "resident_ms": resident.step_ms,
                "resident_peak_allocated_bytes": resident.peak_allocated_bytes,
                "step_ms": statistics.median(times),
                "step_ms_min": min(times),
                "step_ms_max": max(times),
                "setup_s": setup_s,
                "bit_identical": torch.equal(output, resident.output),
            }
            | ({"twin_ms": statistics.median(of_twin)} if of_twin else {})
        )


def _warm_up(model: nn.Module, inputs: dict[str, Any], steps: int) -> int:
    """Run untimed steps; return how many to time, of ``steps``: slow engines get fewer.

    The first step does not count: some engines move the whole model in it.
    """
    timed_steps(model, inputs, 1)
    step_s = timed_steps(model, inputs, 1)[0][0] / 1e3
    if step_s > SLOW_STEP_S:
        return max(MIN_STEPS, min(steps, int(TIMED_S / step_s)))
    timed_steps(model, inputs, UNTIMED_STEPS - 2)
    return steps


def _run_ours(
    model: nn.Module,
    inputs: dict[str, Any],
    resident: Resident,
    options: dict[str, Any],
    request: BenchRequest,
) -> Row:
    """Return our row; a cap too small for whole blocks' surroundings streams those, too."""
    where = {"device": request.device}
    is_too_small = False
    of_twin: list[float] = []
    twin: nn.Module | None = None

    def timer(shell: nn.Module, _: Session) -> tuple[list[float], Any, Resident]:
        if twin is None:
            with quiet_core():
                return (*timed_steps(shell, inputs, request.steps), resident)
        times, some, output = steps_in_turns(shell, twin, inputs, request.steps)
        of_twin.extend(some)
        return times, output, resident

    try:
        if options.get("offload") == 0:
            whole = resident.peak_device_bytes
            twin = place_twin(model, resident, request.device, to_come=whole)
        row = measure(
            fresh(model),
            inputs,
            resident,
            options | where,
            request.steps,
            beside=bytes_on_gpu(twin),
            timer=timer,
        )
        row |= {"twin_ms": statistics.median(of_twin)} if of_twin else {}
    except CapError as error:
        is_too_small = options.get("mode") != "layerwise"
        row = {"engine": "blockswap", "status": f"refused: {error}"}
    except BlockswapError as error:
        row = {"engine": "blockswap", "status": f"refused: {error}"}
    except ENGINE_ERRORS as error:
        row = {"engine": "blockswap", "status": f"failed: {type(error).__name__}: {error}"}
    twin = None
    _clean_up()  # outside the handlers, whose tracebacks hold the model
    if is_too_small:
        return _run_ours(model, inputs, resident, options | {"mode": "layerwise"}, request)
    return row | {"settings": options}


def _clean_up() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch._C._host_emptyCache()  # pinned memory that an engine left behind
        reset_peaks()
