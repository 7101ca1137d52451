"""Engines side by side: who is paired with whom, what is refused, what is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from blockswap.bench import BenchRequest, compare, run_bench
from blockswap.bench import run as bench_run
from blockswap.bench.command import settings_text
from blockswap.bench.compare import caps_to_run
from blockswap.bench.engines import PEERS, Engine
from blockswap.cli import app
from blockswap.errors import ConfigError

GIB = 2**30


def row(engine: str, gib: float, ms: float, status: str = "ok", **settings: Any) -> dict[str, Any]:
    return {
        "model": "flux",
        "engine": engine,
        "settings": settings,
        "status": status,
        "peak_allocated_bytes": int(gib * GIB),
        "step_ms": ms,
        "bit_identical": True,
    }


RESIDENT = row("resident", 22.0, 170.0)
SMALLEST = row("blockswap", 0.6, 470.0)


# ---- comparing ----------------------------------------------------------------------------------


def test_ours_never_peaks_above_the_engine_it_is_set_against() -> None:
    rows = [
        RESIDENT,
        SMALLEST,
        row("diffusers-block", 1.8, 467.0),
        row("blockswap", 1.79, 410.0),
        row("blockswap", 12.0, 220.0),
    ]
    (found,) = compare(rows)
    assert (found.kind, found.our_step_ms) == ("streams", 410.0)
    assert found.holds
    assert found.gap_mib < 0


def test_an_engine_below_our_smallest_plan_is_set_against_that_plan_and_the_gap_is_told() -> None:
    (found,) = compare([RESIDENT, SMALLEST, row("accelerate-sequential", 0.5, 4000.0)])
    assert found.kind == "below our smallest"
    assert found.our_step_ms == 470.0
    assert found.gap_mib == pytest.approx(0.1 * 1024, abs=1)


@pytest.mark.parametrize(("our_ms", "holds"), [(171.0, True), (175.0, False)])
def test_against_an_engine_that_keeps_all_weights_ours_may_take_one_per_cent_more(
    our_ms: float, holds: bool
) -> None:
    rows = [
        RESIDENT,
        SMALLEST,
        row("accelerate-model", 22.0, 170.0),
        row("blockswap", 22.3, our_ms),
    ]
    (found,) = compare(rows)
    assert found.kind == "keeps all"
    assert found.holds is holds


def test_a_slower_row_of_ours_does_not_hold() -> None:
    (found,) = compare([RESIDENT, SMALLEST, row("diffusers-leaf", 0.61, 460.0)])
    assert not found.holds
    assert found.ratio == pytest.approx(460 / 470)


def test_rows_that_failed_are_compared_with_nothing() -> None:
    failed = {"model": "flux", "engine": "mmgp", "settings": {}, "status": "failed: no"}
    assert compare([RESIDENT, SMALLEST, failed]) == []
    assert compare([RESIDENT, failed]) == []


def test_caps_are_the_peaks_of_engines_that_stream_and_neighbours_share_the_lower_one() -> None:
    peers = [
        row("diffusers-block", 1.80, 1.0),
        row("diffusers-block", 1.81, 1.0),
        row("diffusers-leaf", 0.7, 1.0),
        row("accelerate-sequential", 0.5, 1.0),
        row("accelerate-model", 22.0, 1.0),
        row("mmgp", 5.0, 1.0, status="failed: no"),
    ]
    assert caps_to_run(peers, SMALLEST, RESIDENT) == [int(0.7 * GIB), int(1.80 * GIB)]


def test_settings_are_told_in_few_words() -> None:
    settings = {"offload_type": "block_level", "num_blocks_per_group": 4, "use_stream": True}
    assert settings_text(settings) == "num_blocks_per_group=4 use_stream"
    assert settings_text({"record_stream": False}) == "default"


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

    def measure(model: Any, inputs: Any, resident: Any, options: Any, steps: int) -> Any:
        tried.append(dict(options))
        if "swap_space" not in options and options.get("mode") != "layerwise":
            raise bench_run.CapError("too small")
        return real(model, inputs, resident, options, steps)

    monkeypatch.setattr(bench_run, "measure", measure)
    run_bench(request(tmp_path / "bench.json"), lambda *_: None, "blockswap bench")
    assert [options.get("mode") for options in tried] == ["layerwise", None, "layerwise"]


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


# ---- the command --------------------------------------------------------------------------------


def test_the_command_draws_a_table_and_a_picture_from_a_file(tmp_path: Path) -> None:
    out, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    rows = [RESIDENT, SMALLEST, row("diffusers-leaf", 0.61, 484.0, use_stream=True)]
    out.write_text(json.dumps({"rows": rows}))
    done = CliRunner().invoke(
        app, ["bench", "--draw", "--out", str(out), "--picture", str(picture)]
    )
    assert done.exit_code == 0, done.output
    assert "diffusers-leaf" in done.output
    assert "1.03" in done.output
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_command_fails_where_another_engine_is_faster(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    out.write_text(json.dumps({"rows": [RESIDENT, SMALLEST, row("diffusers-leaf", 0.61, 400.0)]}))
    done = CliRunner().invoke(app, ["bench", "--draw", "--out", str(out)])
    assert done.exit_code == 1
    assert "SLOWER" in done.output


def test_the_command_fails_where_our_output_differs_or_ours_did_not_run(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    other = row("diffusers-leaf", 0.61, 484.0)
    for ours in (SMALLEST | {"bit_identical": False}, SMALLEST | {"status": "refused: no"}):
        out.write_text(json.dumps({"rows": [RESIDENT, ours, other]}))
        assert CliRunner().invoke(app, ["bench", "--draw", "--out", str(out)]).exit_code == 1


def test_what_fails_in_ours_becomes_a_row_and_the_bench_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(*_: Any) -> Any:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(bench_run, "measure", measure)
    rows = run_with([Engine("plain", "torch", plain)], tmp_path / "bench.json", monkeypatch)
    assert rows["blockswap"]["status"] == "failed: OutOfMemoryError: no memory"
    assert rows["plain"]["status"] == "ok"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--draw", "--out", "missing.json"], "missing.json holds no results"),
        (["--out", "bench.txt"], "must end in .json"),
        (["--out", "no/such/folder/bench.json"], "does not exist"),
        (["--picture", "bench.bmp"], "must end in .png"),
        (["--model", "sd1", "--device", "cpu"], "unknown model sd1"),
    ],
)
def test_the_command_refuses_bad_input_in_one_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["bench", *arguments])
    assert done.exit_code == 2
    assert message in done.output
    assert len(done.output.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
