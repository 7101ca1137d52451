"""Engines side by side: how each is run and measured, and which requests are refused."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from blockswap.bench import BenchRequest, run_bench
from blockswap.bench import run as bench_run
from blockswap.bench.engines import PEERS, Engine
from blockswap.bench.timing import Resident
from blockswap.bench.twin import STEPS_OF_TURN, place_twin, steps_in_turns
from blockswap.errors import ConfigError

CORES = os.sched_getaffinity(0)  # before any test could keep one

# ---- running ------------------------------------------------------------------------------------


def request(out: Path, **fields: Any) -> BenchRequest:
    given: dict[str, Any] = {
        "models": ("flux",),
        "size": "tiny",
        "engines": (),
        "steps": 2,
        "device": "cpu",
        "out": out,
    }
    return BenchRequest(**(given | fields))


def plain(model: nn.Module, device: torch.device, _: dict[str, Any]) -> Any:
    model.to(device)
    return lambda: None


def broken(model: nn.Module, *_: Any) -> Any:
    next(model.parameters()).data = torch.zeros(1)
    raise RuntimeError("no such thing")


def scaled(model: nn.Module, *_: Any) -> Any:
    next(model.parameters()).data = next(model.parameters()).data * 2
    return lambda: None


def run_with(
    engines: list[Engine], out: Path, monkeypatch: pytest.MonkeyPatch, **fields: Any
) -> dict[str, dict[str, Any]]:
    monkeypatch.setattr(BenchRequest, "chosen_engines", lambda _: engines)
    run_bench(request(out, **fields), lambda *_: None, "blockswap bench")
    rows = json.loads(out.read_text())["rows"]
    return {row["engine"]: row for row in rows}


def test_every_engine_gets_the_same_weights_whatever_the_one_before_did_to_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines = [
        Engine("scaled", "torch", scaled),
        Engine("broken", "torch", broken),
        Engine("plain", "torch", plain),
    ]
    rows = run_with(engines, tmp_path / "bench.json", monkeypatch)
    assert rows["scaled"]["bit_identical"] is False
    assert rows["broken"]["status"] == "failed: RuntimeError: no such thing"
    assert rows["plain"]["bit_identical"] is True
    assert rows["blockswap"]["bit_identical"] is True


def test_what_an_engine_did_to_the_process_is_undone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undone: list[str] = []

    def put(model: nn.Module, *_: Any) -> Any:
        return lambda: undone.append("yes")

    run_with([Engine("one", "torch", put)], tmp_path / "bench.json", monkeypatch)
    assert undone == ["yes"]


@pytest.mark.parametrize(("slow_step_s", "runs"), [(0.0, 2 + 2), (60.0, 3 + 6)])
def test_an_engine_with_slow_steps_is_timed_in_fewer_of_them(
    slow_step_s: float, runs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forwards: list[nn.Module] = []

    def put(model: nn.Module, *_: Any) -> Any:
        model.register_forward_pre_hook(lambda module, _: forwards.append(module))
        return lambda: None

    monkeypatch.setattr(bench_run, "SLOW_STEP_S", slow_step_s)
    monkeypatch.setattr(bench_run, "TIMED_S", 0.0)
    run_with([Engine("one", "torch", put)], tmp_path / "bench.json", monkeypatch, steps=6)
    assert len(forwards) == runs


def test_after_an_interruption_the_rows_measured_so_far_are_in_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> Any:
        raise KeyboardInterrupt

    out = tmp_path / "bench.json"
    with pytest.raises(KeyboardInterrupt):
        run_with([Engine("one", "torch", interrupt)], out, monkeypatch)
    rows = json.loads(out.read_text())["rows"]
    assert [row["engine"] for row in rows] == ["resident", "blockswap"]
    assert list(tmp_path.iterdir()) == [out]


def test_our_smallest_plan_streams_everything_through_a_ring_of_the_largest_leaf(
    tmp_path: Path,
) -> None:
    out = tmp_path / "bench.json"
    run_bench(request(out), lambda *_: None, "blockswap bench")
    smallest = json.loads(out.read_text())["rows"][1]
    assert smallest["status"] == "ok"
    assert smallest["settings"]["mode"] == "layerwise"
    assert smallest["copies_per_step"] == smallest["num_pieces"]
    assert f"{smallest['ring_bytes']}B" == smallest["settings"]["swap_space"]


def test_a_cap_that_needs_more_than_blocks_to_stream_is_tried_layerwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[dict[str, Any]] = []
    real = bench_run.measure

    def measure(
        model: Any, inputs: Any, resident: Any, options: Any, steps: int, **rest: Any
    ) -> Any:
        tried.append(dict(options))
        if "swap_space" not in options and options.get("mode") != "layerwise":
            raise bench_run.CapError("too small")
        return real(model, inputs, resident, options, steps, **rest)

    monkeypatch.setattr(bench_run, "measure", measure)
    run_bench(request(tmp_path / "bench.json"), lambda *_: None, "blockswap bench")
    assert [options.get("mode") for options in tried] == ["layerwise", None, "layerwise"]


def test_what_fails_in_ours_becomes_a_row_and_the_bench_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(bench_run, "measure", measure)
    rows = run_with([Engine("plain", "torch", plain)], tmp_path / "bench.json", monkeypatch)
    assert rows["blockswap"]["status"] == "failed: OutOfMemoryError: no memory"
    assert rows["plain"]["status"] == "ok"


def test_ours_that_keeps_all_weights_is_timed_in_turns_with_an_unhooked_twin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places, real = [], bench_run.place_twin

    def place_twin(*args: Any, **how: Any) -> Any:
        twin = real(*args, **how)
        assert twin is not None
        twin.register_forward_pre_hook(lambda *_: places.append("twin"))
        return twin

    monkeypatch.setattr(bench_run, "place_twin", place_twin)
    run_bench(request(tmp_path / "bench.json", steps=2), lambda *_: None, "blockswap bench")
    ours = json.loads((tmp_path / "bench.json").read_text())["rows"][1:]
    (beside,) = [row for row in ours if "twin_ms" in row]
    assert beside["settings"] == {"offload": 0} and beside["twin_ms"] > 0
    assert len(places) == 2 * 3


def test_a_model_with_long_steps_gets_no_twin() -> None:
    resident = Resident(step_ms=1001.0, peak_allocated_bytes=0, peak_device_bytes=0, output=None)  # type: ignore[arg-type]
    assert place_twin(nn.Linear(2, 2), resident, "cpu") is None
    assert place_twin(nn.Linear(2, 2), replace(resident, step_ms=999.0), "cpu") is not None


def test_model_and_twin_begin_every_second_turn() -> None:
    log: list[str] = []

    def named(name: str) -> nn.Module:
        model = nn.Linear(2, 2)
        model.register_forward_pre_hook(lambda *_: log.append(name))
        return model

    with torch.no_grad():
        inputs = {"input": torch.ones(1, 2)}
        times, of_twin, _ = steps_in_turns(named("model"), named("twin"), inputs, 3)
    assert log[::STEPS_OF_TURN] == ["twin", "model", "model", "twin", "twin", "model"]
    assert len(times) == len(of_twin) == 3 * (STEPS_OF_TURN - 1)


def test_a_turn_that_fails_leaves_the_thread_its_cores() -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("no step")

    model = nn.Linear(2, 2)
    model.register_forward_pre_hook(fails)
    with pytest.raises(RuntimeError, match="no step"):
        steps_in_turns(model, model, {"input": torch.ones(1, 2)}, 2)
    assert os.sched_getaffinity(0) == CORES


# ---- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"engines": ("deepspeed",)}, "unknown engine deepspeed: choose from diffusers-block"),
        ({"models": ("sd1",)}, "unknown model sd1: choose from flux"),
        ({"size": "huge"}, "unknown size huge"),
        ({"steps": 1}, "1 steps are too few"),
    ],
)
def test_bad_requests_are_refused_by_name(fields: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        request(Path("bench.json"), **fields)


def test_an_engine_that_is_not_installed_is_refused_when_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Engine, "is_installed", property(lambda engine: engine.name != "mmgp"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ConfigError, match="mmgp needs mmgp, which is not installed"):
        request(Path("bench.json"), device="cuda", engines=("mmgp",)).chosen_engines()
    names = [e.name for e in request(Path("bench.json"), device="cuda").chosen_engines()]
    assert names == [engine.name for engine in PEERS if engine.name != "mmgp"]
