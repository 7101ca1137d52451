"""Committed mutants: each breaks one rule of the engine, and the engine's own test must notice."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLAGS = ["-std=c++20", "-O1", "-pthread", "-Icsrc"]
# What tests/cpp/engine_test.cpp links.
NAMES = "error host_pace plan cut slots search climb cycle cycle_replay simulate validate explain schedule engine engine_times"


@dataclass(frozen=True)
class Mutant:
    """One line of a source file, replaced."""

    name: str
    file: str
    line: str
    becomes: str


MUTANTS = [
    Mutant("no ready wait", "engine.cpp", "device_->wait(compute, track.ready);", ";"),
    Mutant(
        "no done wait",
        "engine.cpp",
        "device_->wait(stream, tracks_[static_cast<size_t>(action.overwritten)].done);",
        ";",
    ),
    Mutant(
        "wrong wrap",
        "schedule.cpp",
        "return steps > 0 ? steps : steps + static_cast<int32_t>(cycle_.size());",
        "return steps >= 0 ? steps : steps + static_cast<int32_t>(cycle_.size());",
    ),
    Mutant(
        "stale resident after an edit",
        "engine.cpp",
        "copy_fixed(targets_[index], images_[index], plan_.pieces[index].bytes);\n  } else {",
        ";\n  } else {",
    ),
    Mutant(
        "stale slot after an edit",
        "engine.cpp",
        "schedule_->invalidate(piece);",
        ";",
    ),
    Mutant(
        "only the first of two fetches waits for a copy that nobody used",
        "schedule.cpp",
        "actions.push_back({Action::Kind::kOutrun, earlier.piece});\n",
        "actions.push_back({Action::Kind::kOutrun, earlier.piece});\n      earlier.used = true;\n",
    ),
    Mutant(
        "no wait for a copy that nobody used",
        "engine.cpp",
        "device_->wait(plan_.copy_on_compute ? compute : copy_streams_[next_copy_stream_],\n"
        "                      track.ready);",
        ";",
    ),
]


def compiler() -> str:
    """The C++ compiler; without one this project cannot be built either."""
    found = shutil.which("c++") or shutil.which("g++")
    assert found is not None, "no C++ compiler"
    return found


def compile_object(source: Path, target: Path) -> None:
    subprocess.run([compiler(), *FLAGS, "-c", str(source), "-o", str(target)], cwd=ROOT, check=True)


def link_and_run(objects: list[Path], program: Path) -> subprocess.CompletedProcess[bytes]:
    subprocess.run([compiler(), *map(str, objects), "-pthread", "-o", str(program)], check=True)
    return subprocess.run([str(program)], capture_output=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("objects")
    made = {}
    for name in NAMES.split():
        made[name] = folder / f"{name}.o"
        compile_object(ROOT / "csrc" / f"{name}.cpp", made[name])
    made["test"] = folder / "test.o"
    compile_object(ROOT / "tests" / "cpp" / "engine_test.cpp", made["test"])
    return made


def test_the_engine_itself_passes(objects: dict[str, Path], tmp_path: Path) -> None:
    done = link_and_run(list(objects.values()), tmp_path / "engine_test")
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant_is_noticed(mutant: Mutant, objects: dict[str, Path], tmp_path: Path) -> None:
    source = (ROOT / "csrc" / mutant.file).read_text()
    assert source.count(mutant.line) == 1, f"{mutant.file} changed: mend the mutant"
    folder = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", folder, ignore=shutil.ignore_patterns("*.o"))
    broken = folder / mutant.file
    broken.write_text(source.replace(mutant.line, mutant.becomes))
    made = tmp_path / "mutant.o"
    compile_object(broken, made)
    linked = dict(objects) | {broken.stem: made}
    runs = [link_and_run(list(linked.values()), tmp_path / "engine_test") for _ in range(3)]
    assert any(run.returncode != 0 for run in runs), f"nothing noticed: {mutant.name}"
