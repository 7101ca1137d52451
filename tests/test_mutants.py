"""Committed mutants: each breaks one rule of a C++ part, and the part's own test must notice."""

from __future__ import annotations

import functools
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLAGS = ["-std=c++20", "-O1", "-pthread", "-Icsrc"]
HEAP = "error device/heap"
POOL = (
    "error os device/heap device/stream_clock device/caching_pool device/caching_pool_growth "
    "device/host_pages device/segment_pages device/cpu"
)
BOUNCE = "fetch_thread bounce_ring copy_team pinner host_arena arena_fill os"
# What tests/cpp/<part>_test.cpp links.
PARTS = {
    "engine": "error host_pace plan cut slots search climb cycle cycle_replay simulate validate "
    "explain schedule engine engine_fetch engine_times " + BOUNCE,
    "engine_bounce": "error host_pace plan cut slots search climb cycle cycle_replay simulate "
    "validate explain schedule engine engine_fetch engine_times " + BOUNCE,
    "heap": HEAP,
    "heap_model": HEAP,
    "caching_pool": POOL,
    "caching_pool_growth": POOL,
    "caching_pool_history": POOL,
    "pluggable": POOL + " device/pluggable",
    "host_arena_fill": "error os arena_fill host_arena",
}


@dataclass(frozen=True)
class Mutant:
    """One line of a source file, replaced."""

    name: str
    file: str
    line: str
    becomes: str
    part: str = "engine"


MUTANTS = [
    Mutant("no ready wait", "engine_fetch.cpp", "device_->wait(compute, event);", ";"),
    Mutant(
        "no done wait",
        "engine_fetch.cpp",
        "fetch.overwritten = tracks_[static_cast<size_t>(action.overwritten)].done;",
        ";",
    ),
    Mutant(
        "wrong wrap",
        "schedule.cpp",
        "return steps > 0 ? steps : steps + static_cast<int32_t>(cycle_.size());",
        "return steps >= 0 ? steps : steps + static_cast<int32_t>(cycle_.size());",
    ),
    Mutant(
        "a resident is copied under the step that reads it",
        "engine_fetch.cpp",
        "wait_for_compute(copy_streams_[0], compute);\n  Fetch fetch;",
        "Fetch fetch;",
    ),
    Mutant(
        "a plan is filled while others compute in its memory",
        "engine.cpp",
        "    wait_for_compute(stream, compute);\n",
        "    (void)stream;\n",
    ),
    Mutant(
        "stale resident after an edit",
        "engine_fetch.cpp",
        "residents_pending_ = true;",
        ";",
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
        "engine_fetch.cpp",
        "fetch.outrun.swap(outrun_);",
        "outrun_.clear();",
    ),
    Mutant(
        "a bounce slot is filled before its copy has left it",
        "bounce_ring.cpp",
        "device_->synchronize(left);",
        ";",
        "engine_bounce",
    ),
    Mutant(
        "compute waits for a fetch that is not issued yet",
        "engine_fetch.cpp",
        "fetch_thread_->wait_issued(fetch);",
        ";",
        "engine_bounce",
    ),
    Mutant(
        "pageable images are copied directly",
        "engine_fetch.cpp",
        "fetch.image = images_[index];",
        "fetch.image = {images_[index].address, true};",
        "engine_bounce",
    ),
    Mutant(
        "two streams' free blocks merge",
        "device/heap.cpp",
        "left->owner == right->owner;",
        "left->is_free() == right->is_free();",
        "heap",
    ),
    Mutant(
        "merging forgets the later use",
        "device/heap.cpp",
        "block->tick = std::max(block->tick, next->tick);",
        ";",
        "heap",
    ),
    Mutant(
        "a block is anyone's at once",
        "device/heap.cpp",
        "if (block->tick <= done) {",
        "if (block->tick <= done + 1) {",
        "caching_pool",
    ),
    Mutant(
        "a mark counts as done when it is made",
        "device/stream_clock.cpp",
        "while (!marks_.empty() && device_->is_done(marks_.front().event)) {",
        "while (!marks_.empty()) {",
        "caching_pool",
    ),
    Mutant(
        "a stream that only waits is taken for idle",
        "device/stream_clock.cpp",
        "num_looks = !is_dead_ && device_->is_idle(stream_) ? kIdleLooks : 1;",
        "if (device_->is_idle(stream_)) return reach(now_++);",
        "caching_pool",
    ),
    Mutant(
        "a destroyed stream is called again",
        "device/stream_clock.cpp",
        "if (!is_dead_) {",
        "if (true) {",
        "caching_pool",
    ),
    Mutant(
        "no wait for the stream whose blocks are taken",
        "device/caching_pool_growth.cpp",
        "clock->make_wait(own.stream());",
        ";",
        "caching_pool_growth",
    ),
    Mutant(
        "another stream's use is forgotten",
        "device/caching_pool.cpp",
        "users.push_back(user);",
        ";",
        "caching_pool",
    ),
    Mutant(
        "the block is gone before its marks are made",
        "device/caching_pool.cpp",
        "  Allocation& allocation = found->second;\n",
        "  Allocation allocation = found->second;\n  allocations_.erase(found);\n",
        "caching_pool",
    ),
    Mutant(
        "a destroyed stream counts as done at once",
        "device/stream_clock.cpp",
        "    device_->synchronize_all();\n",
        "",
        "caching_pool",
    ),
    Mutant(
        "a block is free for all before the device is done",
        "device/caching_pool.cpp",
        "  device_->synchronize_all();  // without the mutex: it may take long\n",
        "",
        "caching_pool",
    ),
    Mutant(
        "a graph gets what its stream may have",
        "device/caching_pool_growth.cpp",
        "Heap::Block* block = heap.allocate_unused(bytes, owner);",
        "Heap::Block* block = heap.allocate(bytes, owner);",
        "caching_pool_growth",
    ),
    Mutant(
        "a promise is believed again and again",
        "device/caching_pool_growth.cpp",
        "if (held_bytes >= least_bytes) {",
        "if (stats_.num_retries > 9) {",
        "caching_pool_growth",
    ),
    Mutant(
        "pressure asks under pressure",
        "device/caching_pool_growth.cpp",
        "  AskingGuard() { is_asking = true; }\n",
        "  AskingGuard() {}\n",
        "caching_pool_growth",
    ),
    Mutant(
        "pages are given back for want of addresses",
        "device/caching_pool_growth.cpp",
        "      return kNoAddresses;\n",
        "      return range_bytes;\n",
        "caching_pool_growth",
    ),
    Mutant(
        "every error is taken for a lack of memory",
        "device/caching_pool_growth.cpp",
        "    pages_->map(span.address, span.bytes);\n  } catch (const OutOfMemory& error) {",
        "    pages_->map(span.address, span.bytes);\n  } catch (const DeviceError& error) {",
        "caching_pool_growth",
    ),
    Mutant(
        "all is tried for what can never be had",
        "device/caching_pool.cpp",
        "if (rounded > std::min(limit_bytes_, pages_->total_bytes())) {",
        "if (rounded > kMostBytes) {",
        "caching_pool_growth",
    ),
    Mutant(
        "a use is recorded with the first pool",
        "device/pluggable.cpp",
        "if (pool->try_record_use(address, stream)) {",
        "if (pool->try_record_use(address, stream) || true) {",
        "pluggable",
    ),
    Mutant(
        "all memory is taken before the sources are gone",
        "arena_fill.cpp",
        "    os::populate(arena_.data() + first_page, round_up(stop, os::page_bytes()) - first_page);\n",
        "    os::populate(arena_.data(), round_up(arena_.bytes() + first_page % 1, 4096));\n",
        "host_arena_fill",
    ),
    Mutant(
        "the limit is forgotten",
        "device/caching_pool_growth.cpp",
        "if (over_bytes > 0) {",
        "if (over_bytes > limit_bytes_) {",
        "caching_pool_growth",
    ),
    Mutant(
        "pages are given back in the books only",
        "device/caching_pool_growth.cpp",
        "pages_->unmap(span.address, span.bytes);",
        ";",
        "caching_pool_growth",
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
