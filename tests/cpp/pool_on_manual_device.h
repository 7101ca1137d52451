#pragma once

// The pool on a device whose work is done when the test says so, over host memory that faults where
// it is not mapped.

#include <memory>

#include "../../csrc/device/caching_pool.h"
#include "manual_device.h"

namespace blockswap::test {

inline constexpr int64_t kKiB = 1024;
inline constexpr int64_t kMiB = 1024 * kKiB;
inline constexpr int64_t kPage = 2 * kMiB;
inline constexpr Device::Stream kA{0}, kB{1}, kC{2};

struct PoolOnManualDevice {
  explicit PoolOnManualDevice(int64_t limit_bytes = CachingPool::kNoLimit,
                              int64_t memory_bytes = 256 * kMiB, int64_t page_bytes = kPage,
                              int64_t batch_bytes = kPage)
      : device(std::make_shared<ManualDevice>()),
        shared(std::make_shared<WatchedPages::Shared>(*device)),
        pool(std::make_unique<CachingPool>(
            device, std::make_unique<WatchedPages>(shared, memory_bytes, page_bytes, batch_bytes),
            limit_bytes,
            /*check=*/true)) {}
  ~PoolOnManualDevice() {
    pool.reset();
    CHECK(shared->mapped.empty());
    CHECK(shared->ranges.empty());
    CHECK(device->num_events() == 0);
  }
  // A block and work that uses it.
  void* use(int64_t bytes, Device::Stream stream) {
    void* address = pool->allocate(bytes, stream);
    CHECK(shared->uses.may_use(address, bytes, stream));
    shared->uses.note(address, bytes, stream, device->enqueue(stream));
    return address;
  }
  int64_t mapped_bytes() const { return static_cast<int64_t>(shared->mapped.size()) * kPage; }

  std::shared_ptr<ManualDevice> device;
  std::shared_ptr<WatchedPages::Shared> shared;
  std::unique_ptr<CachingPool> pool;
};

}  // namespace blockswap::test
