#pragma once

// Tensors to be copied into an arena, which remember whether they were and when they could go.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <deque>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "../../csrc/host_arena.h"
#include "check.h"

namespace blockswap::test {

constexpr int64_t operator""_KiB(unsigned long long n) { return static_cast<int64_t>(n) << 10; }
constexpr int64_t operator""_MiB(unsigned long long n) { return static_cast<int64_t>(n) << 20; }

inline void sleep_ms(int ms) { std::this_thread::sleep_for(std::chrono::milliseconds(ms)); }

// Never 0, which is what an untouched arena reads as.
inline uint8_t value_at(size_t copy, int64_t index) {
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

inline std::vector<int64_t> odd_sizes(size_t num_sizes, int64_t largest, unsigned seed = 1) {
  std::mt19937 random(seed);
  std::vector<int64_t> sizes;
  for (size_t i = 0; i < num_sizes; ++i) {
    const int64_t top = i % 5 == 0 ? largest : 5000;  // a model: few large tensors, many small ones
    sizes.push_back(std::uniform_int_distribution<int64_t>(0, top)(random));
  }
  return sizes;
}

// The copies from `first` on finish slowly, and not before `asked`: fill is stopped in the middle.
inline void hold_from(Sources& sources, size_t first, std::atomic<bool>& asked) {
  for (size_t i = first; i < sources.copies.size(); ++i) {
    sources.copies[i].safe = [&sources, &asked, i] {
      while (!asked) sleep_ms(1);
      sleep_ms(5);
      sources.drop(i);
    };
  }
}

}  // namespace blockswap::test
