"""Committed mutants: each breaks one rule of a C++ part, and the part's own test must notice."""

from __future__ import annotations

import functools
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.mutants import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parent.parent
FLAGS = ["-std=c++20", "-O1", "-pthread", "-Icsrc"]
HEAP = "error device/heap"
POOL = (
    "error os device/heap device/stream_clock device/caching_pool device/caching_pool_growth "
    "device/batches device/host_pages device/segment_pages device/cpu"
)
BOUNCE = "fetch_thread bounce_ring copy_team pinner host_arena arena_fill os"
# What tests/cpp/<part>_test.cpp links.
PARTS = {
    "engine": "error host_pace plan cut slots search climb cycle cycle_laps cycle_replay simulate validate "
    "explain schedule engine engine_fetch engine_times " + BOUNCE,
    "engine_bounce": "error host_pace plan cut slots search climb cycle cycle_laps cycle_replay simulate "
    "validate explain schedule engine engine_fetch engine_times " + BOUNCE,
    "heap": HEAP,
    "heap_model": HEAP,
    "batches": POOL,
    "caching_pool": POOL,
    "caching_pool_growth": POOL,
    "caching_pool_history": POOL,
    "pluggable": POOL + " device/pluggable",
    "host_arena_fill": "error os arena_fill host_arena",
}


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
def objects_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Path]]:
    folder = tmp_path_factory.mktemp("objects")

    @functools.cache  # parts share sources
    def compiled(source: Path) -> Path:
        made = folder / f"{source.stem}.o"
        compile_object(source, made)
        return made

    def of(part: str) -> dict[str, Path]:
        sources = {name: ROOT / "csrc" / f"{name}.cpp" for name in PARTS[part].split()}
        sources["test"] = ROOT / "tests" / "cpp" / f"{part}_test.cpp"
        return {name: compiled(source) for name, source in sources.items()}

    return of


@pytest.mark.parametrize("part", PARTS)
def test_the_part_itself_passes(
    part: str, objects_of: Callable[[str], dict[str, Path]], tmp_path: Path
) -> None:
    done = link_and_run(list(objects_of(part).values()), tmp_path / "part_test")
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant_is_noticed(
    mutant: Mutant, objects_of: Callable[[str], dict[str, Path]], tmp_path: Path
) -> None:
    source = (ROOT / "csrc" / mutant.file).read_text()
    assert source.count(mutant.line) == 1, f"{mutant.file} changed: mend the mutant"
    folder = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", folder, ignore=shutil.ignore_patterns("*.o"))
    broken = folder / mutant.file
    broken.write_text(source.replace(mutant.line, mutant.becomes))
    made = tmp_path / "mutant.o"
    compile_object(broken, made)
    linked = objects_of(mutant.part) | {mutant.file.removesuffix(".cpp"): made}
    runs = [link_and_run(list(linked.values()), tmp_path / "part_test") for _ in range(3)]
    # A crash would be noticed, too, but says nothing.
    assert any(run.returncode == 1 for run in runs), f"no check noticed: {mutant.name}"
