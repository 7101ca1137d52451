#pragma once

#include <cstdint>
#include <limits>
#include <memory>
#include <mutex>
#include <unordered_map>

#include "device/device.h"
#include "host_arena.h"

namespace blockswap {

// Pins host memory for one device, never more than a bound. Thread-safe.
// Invariant: 0 <= pinned_bytes() <= the bound.
class Pinner : public std::enable_shared_from_this<Pinner> {
 public:
  static constexpr int64_t kNoLimit = std::numeric_limits<int64_t>::max();

  Pinner(std::shared_ptr<Device> device, int64_t limit_bytes)
      : device_(std::move(device)), limit_bytes_(limit_bytes) {}

  // Keep this pinner alive. Whole pages count.
  PinCalls calls();
  int64_t pinned_bytes() const;
  // Whether the system refused what the bound allowed.
  bool was_refused() const;

 private:
  bool pin(void* address, int64_t bytes);
  void unpin(void* address);

  std::shared_ptr<Device> device_;
  const int64_t limit_bytes_;
  mutable std::mutex mutex_;  // guards what follows
  int64_t pinned_bytes_ = 0;
  bool was_refused_ = false;
  std::unordered_map<void*, int64_t> ranges_;
};

}  // namespace blockswap
