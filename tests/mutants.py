"""Mutants: each breaks one rule of a C++ part."""

from __future__ import annotations

from dataclasses import dataclass


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
        "wait_issued(fetch);",
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
    Mutant(
        "what a failed copy left is believed",
        "engine.cpp",
        "    is_lost_ = true;\n    throw;",
        "    throw;",
        "engine",
    ),
    Mutant(
        "a batch holds the page that the next block shares",
        "device/batches.cpp",
        "int64_t left = bytes - page_bytes_; left > 0",
        "int64_t left = bytes; left > page_bytes_",
        "batches",
    ),
    Mutant(
        "part of a batch counts as whole",
        "device/batches.cpp",
        "static_cast<uint64_t>(batch->second) > end",
        "static_cast<uint64_t>(batch->second) > end + 1'000'000'000",
        "batches",
    ),
    Mutant(
        "what is given back is still known as mapped",
        "device/batches.cpp",
        "  batches_.erase(begin, end);\n",
        "",
        "batches",
    ),
]
