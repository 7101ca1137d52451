// Pinning the arena, chunk by chunk. Needs no device: pinning is a pair of functions.

#include "../../csrc/host_arena.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstring>
#include <memory>
#include <mutex>
#include <set>
#include <utility>
#include <vector>

#include "arena_sources.h"
#include "check.h"

using blockswap::ArenaLayout;
using blockswap::HostArena;
using blockswap::PinCalls;
using namespace blockswap::test;

namespace {

// A driver that can refuse a chunk, and remembers what it holds.
struct Driver {
  PinCalls calls() {
    return {[this](void* address, int64_t bytes) {
              const std::lock_guard<std::mutex> lock(mutex);
              if (address == refused) return false;
              CHECK(reinterpret_cast<uintptr_t>(address) % 4096 == 0 && bytes % 4096 == 0);
              for (const auto& [other, other_bytes] : held) {
                CHECK(static_cast<char*>(address) + bytes <= other ||
                      static_cast<char*>(other) + other_bytes <= address);
              }
              held.insert({address, bytes});
              ++num_pins;
              return true;
            },
            [this](void* address) {
              const std::lock_guard<std::mutex> lock(mutex);
              const auto at = std::find_if(held.begin(), held.end(),
                                           [&](const auto& one) { return one.first == address; });
              CHECK(at != held.end());
              if (at != held.end()) held.erase(at);
              ++num_unpins;
            }};
  }
  std::mutex mutex;
  std::set<std::pair<void*, int64_t>> held;
  const void* refused = nullptr;
  int num_pins = 0;
  int num_unpins = 0;
};

// Destroyed after main, when the driver may be gone.
std::unique_ptr<HostArena> outlives_main;

}  // namespace

TEST(a_chunk_that_the_driver_refuses_alone_stays_pageable) {
  const ArenaLayout layout = HostArena::make_layout({60000, 60000, 60001, 60000}, 64_KiB);
  const auto& chunks = layout.chunk_offsets;
  Driver driver;
  {
    HostArena arena(layout);
    driver.refused = arena.data() + chunks[1];
    CHECK(!arena.pin(driver.calls()));
    CHECK(arena.pageable_bytes() == chunks[2] - chunks[1]);
    CHECK(arena.pinned_bytes() == layout.bytes - (chunks[2] - chunks[1]));
    CHECK(arena.is_pinned(0, chunks[1]) && !arena.is_pinned(0, chunks[1] + 1));
    CHECK(!arena.is_pinned(chunks[1], 1) && arena.is_pinned(chunks[2], layout.bytes - chunks[2]));
    CHECK(driver.num_pins == 3);

    driver.refused = nullptr;  // asked again, it grants that one only
    CHECK(arena.pin(driver.calls()) && driver.num_pins == 4 && arena.pageable_bytes() == 0);

    arena.unpin();
    CHECK(driver.num_unpins == 4 && driver.held.empty() && arena.pinned_bytes() == 0);
    arena.unpin();
    CHECK(driver.num_unpins == 4);
    CHECK(arena.pin_range(driver.calls(), 1, chunks[3] - 1));  // whole chunks inside: 1 and 2
    CHECK(driver.num_pins == 6 && !arena.is_pinned(0, 1) && arena.is_pinned(chunks[1], 1));
  }
  CHECK(driver.num_unpins == 6 && driver.held.empty());
}

TEST(chunks_are_given_back_one_by_one_from_the_last_that_is_pinned) {
  const ArenaLayout layout = HostArena::make_layout({64_KiB, 64_KiB, 64_KiB}, 64_KiB);
  Driver driver;
  HostArena arena(layout);
  driver.refused = arena.data() + layout.chunk_offsets[2];
  arena.pin(driver.calls());
  CHECK(arena.unpin_last() == 64_KiB && arena.is_pinned(0, 64_KiB));
  CHECK(!arena.is_pinned(64_KiB, 1) && driver.held.size() == 1);
  CHECK(arena.unpin_last() == 64_KiB && driver.held.empty());
  CHECK(arena.unpin_last() == 0 && driver.num_unpins == 2);
}

TEST(fill_pins_each_chunk_once_and_only_when_it_is_complete) {
  Sources sources(odd_sizes(120, 200_KiB), 256_KiB);
  for (auto& copy : sources.copies) {
    copy.safe = [drop = copy.safe] {
      drop();
      sleep_ms(1);  // time to pin too early
    };
  }
  Driver driver;
  PinCalls calls = driver.calls();
  calls.pin = [&, pin = calls.pin](void* address, int64_t bytes) {
    const int64_t begin = static_cast<uint8_t*>(address) - sources.arena->data();
    for (size_t i = 0; i < sources.copies.size(); ++i) {
      const int64_t offset = sources.copies[i].offset;
      if (offset >= begin && offset < begin + bytes) CHECK(sources.is_whole(i));
    }
    return pin(address, bytes);
  };
  CHECK(sources.arena->fill(sources.copies, 2, {}, calls));
  CHECK(driver.num_pins == static_cast<int>(sources.layout.chunk_offsets.size()));
  CHECK(sources.arena->pageable_bytes() == 0);
  sources.arena.reset();
  CHECK(driver.held.empty());
}

TEST(a_cancelled_fill_pins_no_chunk_with_unfinished_copies) {
  Sources sources(std::vector<int64_t>(100, 30000), 20 * 30208);  // 20 copies a chunk
  std::atomic<bool> asked{false};
  hold_from(sources, 70, asked);
  Driver driver;
  const auto stop_after_three_pins = [&](int64_t done) {
    const std::lock_guard<std::mutex> lock(driver.mutex);
    asked = done >= 72 * 30000 && driver.num_pins >= 3;
    return !asked;
  };
  CHECK(!sources.arena->fill(sources.copies, 2, stop_after_three_pins, driver.calls()));
  const size_t n = sources.check_whole_or_untouched();
  CHECK(n >= 72 && n < 80 && driver.num_pins == 3);
  CHECK(!sources.arena->is_pinned(sources.copies[n].offset, sources.copies[n].bytes));

  CHECK(sources.arena->fill(sources.copies, 2, {}, driver.calls()));
  CHECK(sources.arena->pin(driver.calls()) && driver.num_pins == 5);
  sources.arena.reset();
  CHECK(driver.held.empty());
}

TEST(what_is_released_while_pinned_goes_back_at_unpin) {
  const ArenaLayout layout = HostArena::make_layout({64_KiB, 64_KiB, 64_KiB}, 64_KiB);
  HostArena arena(layout);
  std::memset(arena.data(), 5, static_cast<size_t>(arena.bytes()));
  Driver driver;
  driver.refused = arena.data() + layout.chunk_offsets[1];
  arena.pin(driver.calls());
  arena.release(32_KiB, 128_KiB);  // half of the first, all of the second, half of the third
  CHECK(arena.resident_bytes() == 128_KiB);
  CHECK(arena.data()[40_KiB] == 5 && arena.data()[150_KiB] == 5);
  arena.unpin();
  CHECK(arena.resident_bytes() == 64_KiB);
  CHECK(arena.data()[0] == 5 && arena.data()[32_KiB - 1] == 5 && arena.data()[160_KiB] == 5);
}

TEST(an_arena_that_outlives_main_leaves_the_driver_alone) {
  outlives_main = std::make_unique<HostArena>(1_MiB);
  CHECK(outlives_main->pin({[](void*, int64_t) { return true; },
                            [](void*) {
                              std::fputs("FAILED: unpinned while the process exits\n", stderr);
                              _exit(1);
                            }}));
}

int main() { return blockswap::test::run_all(); }
