// Memory of the fake accelerator: host memory with a byte limit per device.
//
// Statistics follow the host's order, as those of PyTorch's caching allocator do: bytes count from
// allocation until the last owner is gone. The bytes themselves stay until the last task that was
// enqueued with them (`hold`) has run. Memory that is merely wrapped (at::from_blob) is not held:
// what frees or refills it too early is the bug that the fake exists to show.
//
// Fresh and freed memory is filled with 0xFF: NaN as float, half and bfloat16, -1 as an integer.
// Freed blocks rest in a quarantine, so a late reader finds NaN and a late writer is found.
//
// What is freed goes back to the device at once, unless a test wants it kept as on CUDA
// (fake_cache.h). Without that, what is reserved is what is used.
#pragma once

#include "fake_cache.h"

#include <c10/core/CachingDeviceAllocator.h>

#include <cstdint>
#include <functional>
#include <map>
#include <memory>

namespace fake {

constexpr size_t kAlignmentBytes = 512;  // sizes are rounded up to it, as on CUDA
constexpr int kPoison = 0xFF;
constexpr int64_t kDefaultLimitBytes = int64_t{64} << 30;

inline size_t round_up(size_t bytes) {
  return (bytes + kAlignmentBytes - 1) / kAlignmentBytes * kAlignmentBytes;
}

struct MemoryUse {
  int64_t used_bytes = 0;
  int64_t peak_bytes = 0;
  int64_t reserved_bytes = 0;  // the same with what is cached
  int64_t peak_reserved_bytes = 0;
  int64_t limit_bytes = kDefaultLimitBytes;
  int64_t num_retries = 0;          // requests for which the cache was given back
  int64_t num_ooms = 0;             // errors thrown
  int64_t share_bytes = INT64_MAX;  // of the limit, what PyTorch may take
};
MemoryUse memory_use(int device);
void reset_peak(int device);
void set_limit(int device, int64_t limit_bytes);
void set_share(int device, int64_t share_bytes);

// Whether what is freed from now on stays reserved. What was allocated before is not kept.
void keep_freed(bool keeps);
// Gives back, on all devices, the segments that nobody uses a part of.
void empty_cache();
std::map<uint64_t, Cache::Piece> cached_pieces(int device);

// Called without locks when an allocation finds no room; true means that something was freed.
using OutOfMemoryCallback = std::function<bool(int device, size_t bytes)>;
void set_out_of_memory_callback(OutOfMemoryCallback callback);

// Called without locks before every out-of-memory error; what it throws is thrown instead. Stays.
using OutOfMemoryObserver = std::function<void(int device, size_t bytes, const MemoryUse& use)>;
void attach_out_of_memory_observer(OutOfMemoryObserver observer);

// Allocations so far on all devices, and the number of the next one that fails whatever is free.
int64_t num_allocations();
void fail_allocation(int64_t number);

// Number of freed blocks so far that something wrote to after they were freed.
int64_t num_writes_after_free();

// Keeps the bytes behind an allocation of ours; empty for wrapped or host memory.
std::shared_ptr<const void> hold(const c10::DataPtr& data);
// The device whose allocation contains the address, or -1.
int device_of(const void* address);

c10::DeviceAllocator* device_allocator();
bool is_pinned(const void* address);
c10::Allocator* pinned_allocator();

}  // namespace fake
