#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "device.h"
#include "heap.h"
#include "pages.h"
#include "stream_clock.h"

namespace blockswap {

struct PoolStats {
  int64_t allocated_bytes = 0;  // in use by callers
  int64_t pending_bytes = 0;    // freed, but another stream may still use it
  int64_t reserved_bytes = 0;   // mapped
  int64_t peak_allocated_bytes = 0;
  int64_t peak_reserved_bytes = 0;
  int64_t num_allocations = 0;
  int64_t num_frees = 0;
  int64_t num_splits = 0;
  int64_t num_maps = 0;     // times that pages were mapped
  int64_t num_retries = 0;  // times that on_pressure was asked
  int64_t num_ooms = 0;
};

struct PoolBlock {
  enum class State { kAllocated, kPendingFree, kInactive };
  uint64_t address = 0;
  int64_t bytes = 0;
  State state = State::kInactive;
  bool has_stream = false;  // false: every stream may have it
  Device::Stream stream{};
};

// Mapped memory without a hole in it.
struct PoolSegment {
  bool is_small = false;
  std::vector<PoolBlock> blocks;  // without gaps between them
};

// Our caching allocator of device memory. Owns reserved addresses and the pages mapped in them.
//
// Streams: allocate() and free() enqueue work in a stream's order, like a kernel. A freed block may
// be had at once on its own stream; on another one when its last use is over, or when that stream
// was made to wait for it on the device, which happens only where memory is short otherwise. The
// host waits for the device only right before it would report that there is no memory.
// A stream may be destroyed before its blocks: what it did is then waited for on the host. A stream
// that is capturing a graph calls allocate_unused() and nothing else. While one captures that has
// freed blocks, and where memory would be out, nobody else calls the pool: it would ask or mark it.
//
// Pages are mapped by need and stay until give_back() or trim(), or until the limit asks for them
// elsewhere. Blocks of up to 1 MiB lie apart from larger ones, so that they do not split them.
//
// Thread-safe: one mutex, taken after every lock of the caller's (engine, PyTorch's allocator, GIL)
// and held through the calls into the device. on_pressure is called without it, but with whatever
// lock allocate()'s caller holds: where that may be PyTorch's, it must not wait for Python's.
//
// Invariant: allocated + pending <= reserved <= limit. A call that throws has changed nothing that
// callers can see.
class CachingPool {
 public:
  static constexpr int64_t kSmallBytes = int64_t{1} << 20;
  static constexpr int64_t kNoLimit = INT64_MAX;

  // Asked for bytes before memory is reported to be out, by several threads at once perhaps, and
  // only for what the limit and the device could hold. True: try again. After a try in vain it is
  // asked again only if this pool holds less than before, in use or mapped: what is freed
  // elsewhere is tried once. What it allocates from any pool itself asks nobody.
  using Pressure = std::function<bool(int64_t bytes)>;

  // `check`: the heaps check themselves after each action.
  CachingPool(std::shared_ptr<Device> device, std::unique_ptr<Pages> pages, int64_t limit_bytes,
              bool check = false);
  // Waits for the streams that used the pool. Blocks that are still in use die with it.
  ~CachingPool();
  CachingPool(const CachingPool&) = delete;
  CachingPool& operator=(const CachingPool&) = delete;

  // At least `bytes` from a multiple of 512 (of 256 where the device aligns no better). Throws
  // OutOfMemory with the numbers when they cannot be had.
  void* allocate(int64_t bytes, Device::Stream stream);
  // The same of memory whose last use is over, without a call on any stream: for a graph that is
  // being captured. Such a block is freed by free_sync(): nobody knows where the graph runs.
  void* allocate_unused(int64_t bytes, Device::Stream stream);
  // `stream` has used the block so far. Throws UseError for what is no block in use.
  void free(void* address, Device::Stream stream);
  // The same of a block whose last use is over: anybody may have it at once, trim() give it back.
  void free_unused(void* address);
  // The same once the device has done all its work: for blocks whose users nobody knows. Waits.
  void free_sync(void* address);
  // `stream` uses the block, too, until it is freed.
  void record_use(void* address, Device::Stream stream);
  // The same; false for what is no block in use.
  bool try_record_use(void* address, Device::Stream stream);

  // Unmaps whole pages that are free and whose last use is over, until that many bytes are given
  // back or none are left. Never waits. Returns the bytes given back.
  int64_t give_back(int64_t at_least_bytes);
  // The same until no more than `keep_bytes` are mapped without being in use.
  int64_t trim(int64_t keep_bytes);

  // A lower limit gives back what can be given back now; allocations are held to it at once.
  void set_limit(int64_t bytes);
  void set_on_pressure(Pressure pressure);
  // What is mapped and given back at least; 0 where that depends on what was asked for.
  int64_t page_bytes() const { return pages_->is_sparse() ? pages_->granularity_bytes() : 0; }
  // The device's memory; INT64_MAX where it is not known.
  int64_t total_bytes() const { return pages_->total_bytes(); }

  PoolStats stats() const;
  // Both peaks start anew from what is allocated and reserved now.
  void reset_peaks();
  std::vector<PoolSegment> snapshot() const;

 private:
  struct Use {
    Heap::Owner owner;
    int64_t tick;
  };
  struct Allocation {
    Heap* heap;
    Heap::Block* block;
    std::vector<Heap::Owner> users;  // other streams
  };
  using Allocations = std::unordered_map<uint64_t, Allocation>;  // by address
  struct PendingFree {
    Heap* heap;
    Heap::Block* block;
    int64_t tick;  // of the free, in the owner's own count
    std::vector<Use> uses;
  };

  Heap& heap_for(int64_t bytes) { return bytes <= kSmallBytes ? small_ : large_; }
  StreamClock& clock_of(Heap::Owner owner) { return *clocks_[static_cast<size_t>(owner)]; }
  Heap::Owner owner_of_locked(Device::Stream stream);
  Heap::Owner live_owner_locked(Device::Stream stream);  // whoever asks will use it
  Allocations::iterator find_locked(void* address);
  void* note_allocated_locked(Heap::Block* block);
  void add_user_locked(Allocation& allocation, Heap::Owner user);

  Heap::Block* ask_for_locked(std::unique_lock<std::mutex>& lock, int64_t bytes, Heap::Owner owner);
  Heap::Block* try_allocate_locked(int64_t bytes, Heap::Owner owner);
  Heap::Block* try_allocate_unused_locked(int64_t bytes, Heap::Owner owner);
  Heap::Block* grow_locked(Heap& heap, int64_t bytes, Heap::Owner owner);
  int64_t try_grow_locked(Heap& heap, int64_t bytes, Heap::Owner owner);
  bool try_map_locked(Heap& heap, const Heap::Span& span, Heap::Owner owner);
  bool try_add_range_locked(Heap& heap, int64_t bytes);
  void share_done_locked();
  void take_from_others_locked(Heap& heap, Heap::Owner owner);
  void synchronize_locked();
  void synchronize_device_locked();
  void free_pending_locked();
  int64_t give_back_locked(int64_t at_least_bytes);
  int64_t give_back_from_locked(Heap& heap, int64_t at_least_bytes);
  int64_t reserved_bytes_locked() const { return small_.mapped_bytes() + large_.mapped_bytes(); }
  int64_t allocated_bytes_locked() const {
    return small_.used_bytes() + large_.used_bytes() - stats_.pending_bytes;
  }
  [[noreturn]] void report_full_locked(int64_t bytes);
  void check_locked() const;

  std::shared_ptr<Device> device_;
  std::unique_ptr<Pages> pages_;
  const bool check_;
  mutable std::mutex mutex_;
  int64_t limit_bytes_;
  Pressure on_pressure_;
  Heap small_;
  Heap large_;
  std::vector<std::unique_ptr<StreamClock>> clocks_;  // an owner is an index
  Allocations allocations_;
  std::vector<PendingFree> pending_;
  PoolStats stats_;
  std::string refusal_;  // the driver's, for the error message; empty = the limit
};

}  // namespace blockswap
