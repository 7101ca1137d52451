// Needs no device and no torch: pinning is a pair of functions.
#include "../../csrc/host_arena.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <stdexcept>
#include <thread>
#include <utility>
#include <vector>

#include "../../csrc/error.h"
#include "../../csrc/os.h"
#include "../../csrc/plan.h"
#include "check.h"

namespace {

using blockswap::ArenaLayout;
using blockswap::ConfigError;
using blockswap::HostArena;
using blockswap::PinCalls;
using blockswap::UseError;

constexpr int64_t operator""_KiB(unsigned long long n) { return static_cast<int64_t>(n) << 10; }
constexpr int64_t operator""_MiB(unsigned long long n) { return static_cast<int64_t>(n) << 20; }

void sleep_ms(int ms) { std::this_thread::sleep_for(std::chrono::milliseconds(ms)); }

// Never 0, which is what an untouched arena reads as.
uint8_t value_at(size_t copy, int64_t index) {
  const auto k = static_cast<size_t>(index);
  return static_cast<uint8_t>(1 + (copy * 31 + k * 7 + (k >> 12)) % 255);
}

// Tensors to be copied in. Each is dropped (its memory gone) by its `safe`.
struct Sources {
  explicit Sources(const std::vector<int64_t>& sizes, int64_t chunk_bytes = 1024_MiB)
      : layout(HostArena::make_layout(sizes, chunk_bytes)), num_safe(sizes.size(), 0) {
    for (size_t i = 0; i < sizes.size(); ++i) {
      auto& bytes = memory.emplace_back(new uint8_t[static_cast<size_t>(sizes[i]) + 1]);
      for (int64_t k = 0; k < sizes[i]; ++k) {
        bytes[k] = value_at(i, k);
      }
      copies.push_back({bytes.get(), layout.image_offsets[i], sizes[i], [this, i] { drop(i); }});
    }
  }

  void drop(size_t i) {
    CHECK(is_whole(i));
    ++num_safe[i];
    memory[i].reset();
  }
  bool is_whole(size_t i) const {
    const auto at = arena->data() + copies[i].offset;
    for (int64_t k = 0; k < copies[i].bytes; ++k) {
      if (at[k] != value_at(i, k)) return false;
    }
    return true;
  }
  bool is_zero(int64_t begin, int64_t end) const {
    return std::all_of(arena->data() + begin, arena->data() + end,
                       [](uint8_t value) { return value == 0; });
  }

  // What must hold whenever fill has ended, in whatever way. Returns how many copies are finished.
  size_t check_whole_or_untouched() const {
    const auto n = static_cast<size_t>(std::count_if(
        copies.begin(), copies.end(), [](const auto& copy) { return copy.finished; }));
    for (size_t i = 0; i < copies.size(); ++i) {
      CHECK(copies[i].finished == (i < n));
      CHECK(num_safe[i] == (i < n ? 1 : 0));
      CHECK((copies[i].safe == nullptr) == (i < n));  // what it held is let go too
      CHECK((memory[i] == nullptr) == (i < n));
      CHECK(i < n ? is_whole(i) : is_zero(copies[i].offset, copies[i].offset + copies[i].bytes));
    }
    return n;
  }

  ArenaLayout layout;
  std::deque<std::unique_ptr<uint8_t[]>> memory;
  std::vector<int> num_safe;
  std::vector<HostArena::Copy> copies;
  std::unique_ptr<HostArena> arena = std::make_unique<HostArena>(layout);
};

std::vector<int64_t> odd_sizes(size_t num_sizes, int64_t largest, unsigned seed = 1) {
  std::mt19937 random(seed);
  std::vector<int64_t> sizes;
  for (size_t i = 0; i < num_sizes; ++i) {
    const int64_t top = i % 5 == 0 ? largest : 5000;  // a model: few large tensors, many small ones
    sizes.push_back(std::uniform_int_distribution<int64_t>(0, top)(random));
  }
  return sizes;
}

// The copies from `first` on finish slowly, and not before `asked`: fill is stopped in the middle.
void hold_from(Sources& sources, size_t first, std::atomic<bool>& asked) {
  for (size_t i = first; i < sources.copies.size(); ++i) {
    sources.copies[i].safe = [&sources, &asked, i] {
      while (!asked) sleep_ms(1);
      sleep_ms(5);
      sources.drop(i);
    };
  }
}

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

#if !IS_SANITIZED
int64_t process_resident_bytes() {
  long long size = 0;
  long long resident = 0;
  std::FILE* file = std::fopen("/proc/self/statm", "r");
  CHECK(file != nullptr && std::fscanf(file, "%lld %lld", &size, &resident) == 2);
  if (file != nullptr) std::fclose(file);
  return resident * sysconf(_SC_PAGESIZE);
}
#endif

// Destroyed after main, when the driver may be gone.
std::unique_ptr<HostArena> outlives_main;

}  // namespace

TEST(layout_keeps_images_in_order_aligned_and_inside_chunks_with_little_padding) {
  std::mt19937 random(7);
  for (int round = 0; round < 300; ++round) {
    const int64_t chunk_bytes = 4_KiB << (random() % 9);
    const auto sizes = odd_sizes(random() % 60, 300_KiB, static_cast<unsigned>(round));
    const ArenaLayout layout = HostArena::make_layout(sizes, chunk_bytes);
    const auto& chunks = layout.chunk_offsets;
    CHECK(layout.image_offsets.size() == sizes.size() && chunks.front() == 0);
    int64_t end = 0;
    int64_t used = 0;
    for (size_t i = 0; i < sizes.size(); ++i) {
      const int64_t begin = layout.image_offsets[i];
      CHECK(begin % blockswap::kAlignment == 0 && begin >= end);
      end = begin + sizes[i];
      used += (sizes[i] + 255) / 256 * 256;
      const auto next = std::upper_bound(chunks.begin(), chunks.end(), begin);
      CHECK(next == chunks.end() || *next >= end);
      if (end - *std::prev(next) > chunk_bytes) CHECK(begin == *std::prev(next));
    }
    CHECK(layout.bytes >= end && layout.bytes <= used + 4096 * int64_t(chunks.size() - 1));
    for (size_t c = 1; c < chunks.size(); ++c) {
      CHECK(chunks[c] % 4096 == 0 && chunks[c] > chunks[c - 1] && chunks[c] < layout.bytes);
    }
  }
}

TEST(an_arena_takes_no_physical_memory_until_it_is_written) {
  HostArena arena(64_MiB + 5);
  CHECK(arena.resident_bytes() == 0);
  CHECK(reinterpret_cast<uintptr_t>(arena.data()) % blockswap::os::kHugePageBytes == 0);
  arena.data()[64_MiB + 4] = 1;  // the tail must not draw a huge page past the end
  CHECK(arena.resident_bytes() == 4096);
}

TEST(an_arena_that_the_system_refuses_names_its_bytes) {
  CHECK_THROWS(HostArena(int64_t{1} << 50), ConfigError, "1024.00 TiB");
}

TEST(fill_brings_every_byte_of_many_odd_sizes_and_nothing_beside_them) {
  for (const int num_threads : {1, 4}) {
    auto sizes = odd_sizes(IS_SANITIZED ? 60 : 300, IS_SANITIZED ? 100_KiB : 1_MiB);
    sizes.insert(sizes.begin() + 20, {0, 1, 17_MiB + 11});  // the large one in parts
    if (!IS_SANITIZED) sizes.insert(sizes.begin() + 30, {37_MiB + 11, 16_MiB, 16_MiB + 1});
    Sources sources(sizes);
    CHECK(sources.arena->fill(sources.copies, num_threads));
    CHECK(sources.check_whole_or_untouched() == sizes.size());
    for (size_t i = 0; i + 1 < sizes.size(); ++i) {
      CHECK(sources.is_zero(sources.copies[i].offset + sizes[i], sources.copies[i + 1].offset));
    }
    CHECK(sources.arena->resident_bytes() <= sources.layout.bytes + 4096);
  }
}

TEST(progress_ends_with_all_bytes) {
  Sources sources(odd_sizes(50, 100_KiB));
  int64_t last = -1;
  sources.arena->fill(sources.copies, 2, [&](int64_t done) {
    CHECK(done >= last);
    last = done;
    return true;
  });
  int64_t total = 0;
  for (const auto& copy : sources.copies) total += copy.bytes;
  CHECK(last == total);
}

TEST(sources_not_yet_dropped_never_pass_the_bound) {
  HostArena arena(40 * 64_KiB);
  const std::vector<uint8_t> source(64_KiB, 3);
  std::atomic<int> num_open{0};
  std::atomic<int> most_open{0};
  std::vector<HostArena::Copy> copies;
  for (int64_t i = 0; i < 40; ++i) {
    copies.push_back({source.data(), i * 64_KiB, 64_KiB, [&] {
                        const int now = ++num_open;
                        for (int most = most_open; now > most;) {
                          if (most_open.compare_exchange_weak(most, now)) break;
                        }
                        sleep_ms(5);
                        --num_open;
                      }});
  }
  CHECK(arena.fill(copies, 8, {}, {}, 3 * 64_KiB));
  CHECK(most_open <= 3);
}

#if !IS_SANITIZED
TEST(host_memory_never_holds_two_copies_of_the_weights) {
  const int64_t before = process_resident_bytes();
  constexpr int64_t kBytes = 12_MiB;
  constexpr int64_t kTotal = 24 * kBytes;
  HostArena arena(kTotal);
  std::vector<HostArena::Copy> copies;
  std::atomic<int64_t> peak{0};
  for (int64_t i = 0; i < 24; ++i) {
    void* source =
        mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    std::memset(source, 9, kBytes);
    copies.push_back({source, i * kBytes, kBytes, [source, &peak] {
                        const int64_t now = process_resident_bytes();
                        for (int64_t most = peak; now > most;) {
                          if (peak.compare_exchange_weak(most, now)) break;
                        }
                        munmap(source, kBytes);
                      }});
  }
  CHECK(arena.fill(copies, 2, {}, {}, 2 * kBytes));
  CHECK(peak - before > kTotal);  // the figure means something
  CHECK(peak - before < kTotal + kTotal / 10);
  CHECK(process_resident_bytes() - before < kTotal + kTotal / 50);
}
#endif

TEST(cancel_in_the_middle_leaves_each_copy_whole_or_untouched_and_fill_can_go_on) {
  Sources sources(std::vector<int64_t>(150, 20001));
  std::atomic<bool> asked{false};
  hold_from(sources, 70, asked);
  CHECK(!sources.arena->fill(sources.copies, 2, [&](int64_t done) {
    asked = done >= 70 * 20001;
    return !asked;
  }));
  const size_t n = sources.check_whole_or_untouched();
  CHECK(n >= 70 && n < 150);
  CHECK(sources.arena->fill(sources.copies, 3));
  CHECK(sources.check_whole_or_untouched() == 150);
}

TEST(a_large_copy_that_was_started_is_finished_after_a_cancel) {
  Sources sources({100, IS_SANITIZED ? 40_MiB : 96_MiB, 100});
  sources.copies[0].safe = [&sources, drop = sources.copies[0].safe] {
    drop();
    while (sources.arena->resident_bytes() < 8_MiB) std::this_thread::yield();
    throw std::runtime_error("stop");  // while the other worker is inside the large copy
  };
  CHECK_THROWS(sources.arena->fill(sources.copies, 2, {}, {}, 200_MiB), std::runtime_error, "stop");
  CHECK(sources.check_whole_or_untouched() >= 2);
}

TEST(an_exception_from_safe_or_progress_comes_through_and_fill_can_go_on) {
  Sources sources(std::vector<int64_t>(60, 9001));
  std::atomic<bool> thrown{false};
  hold_from(sources, 25, thrown);
  sources.copies[20].safe = [&] {
    sources.drop(20);
    thrown = true;
    throw std::runtime_error("the source would not die");
  };
  CHECK_THROWS(sources.arena->fill(sources.copies, 3), std::runtime_error, "would not die");
  const size_t n = sources.check_whole_or_untouched();
  CHECK(n > 20 && n < 60);

  std::atomic<bool> asked{false};
  hold_from(sources, n, asked);
  const auto interrupt = [&](int64_t) -> bool {
    asked = true;
    throw std::runtime_error("Ctrl-C");
  };
  CHECK_THROWS(sources.arena->fill(sources.copies, 2, interrupt), std::runtime_error, "Ctrl-C");
  CHECK(sources.check_whole_or_untouched() < 60);
  CHECK(sources.arena->fill(sources.copies, 2));
  CHECK(sources.check_whole_or_untouched() == 60);
}

TEST(copies_that_overlap_or_leave_the_arena_are_refused_before_a_byte_moves) {
  HostArena arena(1_MiB);
  const std::vector<uint8_t> source(1_MiB, 1);
  std::vector<HostArena::Copy> over{{source.data(), 0, 300, {}}, {source.data(), 256, 256, {}}};
  CHECK_THROWS(arena.fill(over), UseError, "overlap at offset 256");
  std::vector<HostArena::Copy> past{{source.data(), 0, 300, {}}, {source.data(), 512, 1_MiB, {}}};
  CHECK_THROWS(arena.fill(past), UseError, "1048576 bytes at offset 512");
  CHECK(arena.resident_bytes() == 0);
}

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

TEST(release_gives_whole_pages_back_and_keeps_neighbours) {
  HostArena arena(8_MiB);
  std::memset(arena.data(), 5, static_cast<size_t>(arena.bytes()));
  CHECK(arena.resident_bytes() == 8_MiB);
  arena.release(256, 12_KiB);  // pages 1 and 2 are whole; parts of 0 and 3 belong to others
  CHECK(arena.resident_bytes() == 8_MiB - 8_KiB);
  CHECK(arena.data()[255] == 5 && arena.data()[256 + 12_KiB] == 5);
  arena.release(256 + 12_KiB, 4_KiB - 300);  // up to the end of page 3: its size is rounded up
  CHECK(arena.resident_bytes() == 8_MiB - 12_KiB);
  arena.release(0, 200);  // page 0 is nobody's any more
  CHECK(arena.resident_bytes() == 8_MiB - 16_KiB);
  CHECK(arena.data()[16_KiB] == 5);
}

TEST(tensors_that_die_on_many_threads_give_everything_back) {
  const auto sizes = odd_sizes(400, 100_KiB);
  Sources sources(sizes);
  CHECK(sources.arena->fill(sources.copies, 2));
  std::vector<std::thread> threads;
  for (size_t t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      for (size_t i = t; i < sizes.size(); i += 4) {
        sources.arena->release(sources.copies[i].offset, sizes[i]);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(sources.arena->resident_bytes() == 0);
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

TEST(default_num_threads_is_between_one_and_sixteen) {
  CHECK(HostArena::default_num_threads() >= 1 && HostArena::default_num_threads() <= 16);
}

int main() { return blockswap::test::run_all(); }
