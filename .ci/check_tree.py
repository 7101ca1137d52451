"""Checks the shape of the tree: length of files and lines, and that C++ includes go one way.

    check_tree.py               check; every violation is one line, exit status 1
    check_tree.py --torch-free  print the C++ sources that need neither torch nor a GPU toolkit

The include rules are those of the design: ops, bindings -> engine -> {schedule, homes, codec}
-> {image, host_arena, device} -> error; the planner's files include only each other and error.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MAX_LINES = 320
MAX_TEST_LINES = 320
MAX_COLUMNS = 100
CAPPED = (
    "csrc/**/*",
    "blockswap/**/*.py",
    "tests/**/*.py",
    "tests/**/*.cpp",
    "tests/**/*.h",
    "benchmarks/**/*.py",
    "examples/*.py",
)
CPP_SUFFIXES = (".h", ".hpp", ".cuh", ".cpp", ".cu")

# Layer of a file in csrc, by folder or name; engine_events.cpp is part of engine. A file includes
# its own layer and lower ones. A new idea gets its place here first.
LAYERS = {
    "error": 0,
    "os": 1,
    "arena": 1,
    "copy_team": 1,
    "image": 1,
    "host_arena": 1,
    "device": 1,
    "pinner": 1,
    "bounce": 2,
    "fetch": 2,
    "homes": 2,
    "codec": 2,
    "engine": 3,
    "bind": 4,
    "binding": 4,
    "bindings": 4,
    "ops": 4,
    "torch_allocator": 4,
    "watched": 4,
}
# No device, no torch, no clock: these include only each other and error; all but error and os may
# include them.
PURE = {
    "plan",
    "schedule",
    "simulate",
    "climb",
    "cut",
    "cycle",
    "cycle_laps",
    "cycle_replay",
    "explain",
    "host_pace",
    "search",
    "slots",
    "validate",
}
PURE_FORBIDS = re.compile(r"^(ATen|c10|torch|pybind11|cuda|hip|chrono|ctime)\b")
TORCH = re.compile(r"^(ATen|c10|torch|pybind11|Python\.h)")
GPU = re.compile(r"^(cuda|hip)")
INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', re.MULTILINE)


def made_by_hipify(path: Path) -> bool:
    words = path.stem.split("_")
    return "hip" in (words[0], words[-1]) or path.suffix == ".hip"


def cpp_files() -> list[Path]:
    found = (path for path in (ROOT / "csrc").rglob("*") if path.suffix in CPP_SUFFIXES)
    return sorted(path for path in found if not made_by_hipify(path))


def includes(path: Path) -> Iterator[tuple[str, Path | None]]:
    """Every include of a file as written, and the file of ours that it names, if any."""
    for bracket, name in INCLUDE.findall(path.read_text(encoding="utf-8")):
        for folder in (path.parent, ROOT / "csrc"):
            candidate = (folder / name).resolve()
            if bracket == '"' and candidate.is_file() and candidate.is_relative_to(ROOT):
                yield name, candidate
                break
        else:
            yield name, None


def reachable(path: Path, seen: set[Path]) -> set[Path]:
    if path not in seen:
        seen.add(path)
        for _, ours in includes(path):
            if ours is not None:
                reachable(ours, seen)
    return seen


def place_of(path: Path) -> str:
    """The name by which LAYERS and PURE know a file: csrc/device/cuda.cpp is in `device`."""
    first = path.relative_to(ROOT / "csrc").parts[0].split(".")[0]
    name = first
    while name not in LAYERS and name not in PURE and "_" in name:
        name = name.rpartition("_")[0]
    return name if name in LAYERS or name in PURE else first


def check_includes(path: Path) -> Iterator[str]:
    here = place_of(path)
    where = path.relative_to(ROOT)
    if here not in LAYERS and here not in PURE:
        yield f"{where}: unknown to the include rules; give it a place in .ci/check_tree.py"
        return
    for name, ours in includes(path):
        if here in PURE and PURE_FORBIDS.match(name):
            yield f"{where}: includes {name}; plan, schedule and simulate know no device or clock"
        if TORCH.match(name) and path.parent.name == "device" and path.stem.startswith("cuda"):
            yield f"{where}: includes {name}; CUDA runtime sources stay free of torch headers"
        if GPU.match(name) and here not in ("device", "codec"):
            yield f"{where}: includes {name}; only csrc/device and kernels know CUDA"
        if name == "torch/library.h" and here != "ops":
            yield f"{where}: includes {name}; only ops.cpp knows the dispatcher"
        if ours is None or not ours.is_relative_to(ROOT / "csrc"):
            continue
        there = place_of(ours)
        if here in PURE:
            allowed = there in PURE or there == "error"
        elif there in PURE:
            allowed = here not in ("error", "os")
        else:
            allowed = LAYERS.get(there, 99) <= LAYERS[here]
        if not allowed:
            yield f"{where}: must not include {name} ({here} -> {there} goes the wrong way)"
        if path.suffix in (".h", ".hpp", ".cuh") and path in reachable(ours, set()):
            yield f"{where}: includes itself through {name}"


def check_lengths() -> Iterator[str]:
    for pattern in CAPPED:
        for path in sorted(ROOT.glob(pattern)):
            if not path.is_file() or made_by_hipify(path) or "__pycache__" in path.parts:
                continue
            if path.suffix not in (".py", ".pyi", *CPP_SUFFIXES) or path.name == "_build_info.py":
                continue
            lines = path.read_text(encoding="utf-8").splitlines()
            where = path.relative_to(ROOT)
            most = MAX_TEST_LINES if where.parts[0] == "tests" else MAX_LINES
            if len(lines) > most:
                yield f"{where}: {len(lines)} lines; the cap is {most}: split it by idea"
            if path.suffix in CPP_SUFFIXES:  # ruff sees to Python
                for number, line in enumerate(lines, 1):
                    if len(line) > MAX_COLUMNS:
                        yield f"{where}:{number}: {len(line)} columns; the limit is {MAX_COLUMNS}"


def torch_free_sources() -> list[Path]:
    sources = []
    for path in cpp_files():
        if path.suffix == ".cpp":
            names = {name for file in reachable(path, set()) for name, _ in includes(file)}
            if not any(TORCH.match(name) or GPU.match(name) for name in names):
                sources.append(path)
    return sources


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch-free", action="store_true", help="print torch-free C++ sources")
    if parser.parse_args().torch_free:
        print("\n".join(str(path.relative_to(ROOT)) for path in torch_free_sources()))
        return 0
    violations = [line for path in cpp_files() for line in check_includes(path)]
    violations += check_lengths()
    for line in violations:
        print(line)
    if not violations:
        print(f"tree: {len(cpp_files())} C++ files, includes go one way, no file is too long")
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
