// Bytes that show whoever reads or writes what was never written, or was freed.
#pragma once

#include "fake_memory.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <mutex>
#include <utility>

namespace fake {

inline void* allocate_poisoned(size_t bytes) {
  void* address = std::aligned_alloc(kAlignmentBytes, bytes);
  TORCH_CHECK(address != nullptr, "the host has no ", bytes, " bytes for the fake device");
  std::memset(address, kPoison, bytes);
  return address;
}

inline bool is_poisoned(const void* address, size_t bytes) {
  const auto* begin = static_cast<const unsigned char*>(address);
  return std::all_of(begin, begin + bytes, [](unsigned char byte) { return byte == kPoison; });
}

// Freed memory, still mapped: a use after free reads poison instead of killing the process.
class Quarantine {
 public:
  static Quarantine& of_process() {
    static auto* instance = new Quarantine;  // leaked: workers may free while the process exits
    return *instance;
  }

  void add(void* address, size_t bytes) {
    std::memset(address, kPoison, bytes);
    std::lock_guard lock(mutex_);
    blocks_.emplace_back(address, bytes);
    bytes_ += bytes;
    while (bytes_ > kMaxBytes) {
      auto [oldest, oldest_bytes] = blocks_.front();
      blocks_.pop_front();
      bytes_ -= oldest_bytes;
      num_written_ += !is_poisoned(oldest, oldest_bytes);
      std::free(oldest);
    }
  }

  int64_t num_written() {
    std::lock_guard lock(mutex_);
    for (auto [address, bytes] : blocks_) {
      if (!is_poisoned(address, bytes)) {
        ++num_written_;
        std::memset(address, kPoison, bytes);  // so that it counts once
      }
    }
    return num_written_;
  }

 private:
  static constexpr size_t kMaxBytes = size_t{64} << 20;
  std::mutex mutex_;
  std::deque<std::pair<void*, size_t>> blocks_;
  size_t bytes_ = 0;
  int64_t num_written_ = 0;
};

}  // namespace fake
