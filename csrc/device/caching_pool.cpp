// What callers do with the pool: take, free, look. Where memory comes from when no free block fits
// is caching_pool_growth.cpp.

#include "caching_pool.h"

#include <algorithm>
#include <sstream>
#include <unordered_set>
#include <utility>

#include "../error.h"
#include "../os.h"

namespace blockswap {
namespace {

constexpr int64_t kMostBytes = int64_t{1} << 46;  // beyond any device: sums cannot overflow

int64_t round_up(int64_t bytes) {
  return (bytes + Heap::kAlignment - 1) / Heap::kAlignment * Heap::kAlignment;
}

int64_t checked_bytes(int64_t bytes) {
  if (bytes <= 0 || bytes > kMostBytes) {
    throw UseError("a block of " + std::to_string(bytes) + " bytes was asked for: ask for 1 to " +
                   std::to_string(kMostBytes));
  }
  return round_up(bytes);
}

std::string text_of(const void* address) {
  std::ostringstream text;
  text << address;
  return text.str();
}

}  // namespace

CachingPool::CachingPool(std::shared_ptr<Device> device, std::unique_ptr<Pages> pages,
                         int64_t limit_bytes, bool check)
    : device_(std::move(device)),
      pages_(std::move(pages)),
      check_(check),
      limit_bytes_(limit_bytes) {
  os::watch_exit();  // after the driver's own exit handlers
}

CachingPool::~CachingPool() {
  if (os::process_is_exiting()) {
    return;  // the driver may be gone; it takes the memory with it
  }
  try {
    synchronize_device_locked();  // streams may be gone
    for (const auto& [address, allocation] : allocations_) {
      allocation.heap->free(allocation.block, 0);
    }
    give_back_locked(reserved_bytes_locked());
  } catch (...) {
    return;  // a device that fails so is lost to this process, and its memory with it
  }
  for (Heap* heap : {&small_, &large_}) {
    for (const Heap::Span& range : heap->whole_ranges(Heap::kNobody)) {
      pages_->release(range.address, range.bytes);
    }
  }
}

void* CachingPool::allocate(int64_t bytes, Device::Stream stream) {
  const int64_t rounded = checked_bytes(bytes);
  std::unique_lock lock(mutex_);
  const Heap::Owner owner = live_owner_locked(stream);
  if (rounded > std::min(limit_bytes_, pages_->total_bytes())) {
    refusal_.clear();
    report_full_locked(rounded);  // whatever is freed or given back first: nothing would help
  }
  Heap::Block* block = try_allocate_locked(rounded, owner);
  if (block == nullptr) {
    block = ask_for_locked(lock, rounded, owner);
  }
  if (block == nullptr) {
    synchronize_locked();
    block = try_allocate_locked(rounded, owner);
  }
  if (block == nullptr) {
    report_full_locked(rounded);
  }
  return note_allocated_locked(block);
}

void* CachingPool::allocate_unused(int64_t bytes, Device::Stream stream) {
  const int64_t rounded = checked_bytes(bytes);
  std::lock_guard lock(mutex_);
  Heap::Block* block = try_allocate_unused_locked(rounded, live_owner_locked(stream));
  if (block == nullptr) {
    report_full_locked(rounded);
  }
  return note_allocated_locked(block);
}

void* CachingPool::note_allocated_locked(Heap::Block* block) {
  allocations_.emplace(block->address, Allocation{&heap_for(block->bytes), block, {}});
  ++stats_.num_allocations;
  stats_.peak_allocated_bytes = std::max(stats_.peak_allocated_bytes, allocated_bytes_locked());
  check_locked();
  return reinterpret_cast<void*>(block->address);
}

void CachingPool::free(void* address, Device::Stream stream) {
  std::lock_guard lock(mutex_);
  const auto found = find_locked(address);
  Allocation& allocation = found->second;
  Heap::Block* block = allocation.block;
  StreamClock& clock = clock_of(block->owner);
  add_user_locked(allocation, owner_of_locked(stream));

  // What may throw comes first: the block then still is the caller's.
  std::vector<Use> uses;
  for (const Heap::Owner user : allocation.users) {
    uses.push_back({user, clock_of(user).mark()});
  }
  const int64_t tick = clock.now();
  clock.note_freed(block->bytes);

  if (uses.empty()) {
    allocation.heap->free(block, tick);
  } else {
    stats_.pending_bytes += block->bytes;
    pending_.push_back({allocation.heap, block, tick, std::move(uses)});
  }
  allocations_.erase(block->address);
  ++stats_.num_frees;
  check_locked();
}

void CachingPool::free_sync(void* address) {
  device_->synchronize_all();  // without the mutex: it may take long
  free_unused(address);
}

void CachingPool::free_unused(void* address) {
  std::lock_guard lock(mutex_);
  const auto found = find_locked(address);
  found->second.block->owner = Heap::kAnyone;
  found->second.heap->free(found->second.block, 0);
  allocations_.erase(found);
  ++stats_.num_frees;
  check_locked();
}

void CachingPool::record_use(void* address, Device::Stream stream) {
  std::lock_guard lock(mutex_);
  add_user_locked(find_locked(address)->second, live_owner_locked(stream));
}

bool CachingPool::try_record_use(void* address, Device::Stream stream) {
  std::lock_guard lock(mutex_);
  const auto found = allocations_.find(reinterpret_cast<uint64_t>(address));
  if (found != allocations_.end()) {
    add_user_locked(found->second, live_owner_locked(stream));
  }
  return found != allocations_.end();
}

void CachingPool::add_user_locked(Allocation& allocation, Heap::Owner user) {
  std::vector<Heap::Owner>& users = allocation.users;
  if (user != allocation.block->owner &&
      std::find(users.begin(), users.end(), user) == users.end()) {
    users.push_back(user);
  }
}

Heap::Owner CachingPool::owner_of_locked(Device::Stream stream) {
  for (size_t index = 0; index < clocks_.size(); ++index) {  // a handful of streams
    if (clocks_[index]->stream() == stream) {
      return static_cast<Heap::Owner>(index);
    }
  }
  clocks_.push_back(std::make_unique<StreamClock>(device_, stream));
  return static_cast<Heap::Owner>(clocks_.size() - 1);
}

Heap::Owner CachingPool::live_owner_locked(Device::Stream stream) {
  const Heap::Owner owner = owner_of_locked(stream);
  clock_of(owner).note_alive();
  return owner;
}

CachingPool::Allocations::iterator CachingPool::find_locked(void* address) {
  const auto found = allocations_.find(reinterpret_cast<uint64_t>(address));
  if (found == allocations_.end()) {
    throw UseError(text_of(address) +
                   " is no block of this pool in use: it was freed before, or "
                   "comes from another allocator");
  }
  return found;
}

int64_t CachingPool::give_back(int64_t at_least_bytes) {
  std::lock_guard lock(mutex_);
  const int64_t given = give_back_locked(at_least_bytes);
  check_locked();
  return given;
}

int64_t CachingPool::trim(int64_t keep_bytes) {
  std::lock_guard lock(mutex_);
  free_pending_locked();  // counts as used until somebody looks
  const int64_t unused = reserved_bytes_locked() - small_.used_bytes() - large_.used_bytes();
  const int64_t given = give_back_locked(unused - keep_bytes);
  check_locked();
  return given;
}

void CachingPool::set_limit(int64_t bytes) {
  std::lock_guard lock(mutex_);
  limit_bytes_ = bytes;
  give_back_locked(reserved_bytes_locked() - limit_bytes_);
  check_locked();
}

void CachingPool::set_on_pressure(Pressure pressure) {
  std::lock_guard lock(mutex_);
  std::swap(on_pressure_, pressure);  // the old one dies after the lock: it may need Python's
}

PoolStats CachingPool::stats() const {
  std::lock_guard lock(mutex_);
  PoolStats stats = stats_;
  stats.allocated_bytes = allocated_bytes_locked();
  stats.reserved_bytes = reserved_bytes_locked();
  stats.num_splits = small_.num_splits() + large_.num_splits();
  return stats;
}

void CachingPool::reset_peaks() {
  std::lock_guard lock(mutex_);
  stats_.peak_allocated_bytes = allocated_bytes_locked();
  stats_.peak_reserved_bytes = reserved_bytes_locked();
}

std::vector<PoolSegment> CachingPool::snapshot() const {
  std::lock_guard lock(mutex_);
  std::unordered_set<const Heap::Block*> pending;
  for (const PendingFree& each : pending_) {
    pending.insert(each.block);
  }
  std::vector<PoolSegment> segments;
  for (const Heap* heap : {&small_, &large_}) {
    bool in_segment = false;
    heap->visit([&](const Heap::Block& block) {
      const bool mapped = block.used || block.is_free();
      if (mapped && (!in_segment || block.before == nullptr)) {
        segments.push_back({heap == &small_, {}});
      }
      in_segment = mapped;
      if (!mapped) {
        return;
      }
      PoolBlock shown{block.address,
                      block.bytes,
                      PoolBlock::State::kInactive,
                      block.owner != Heap::kAnyone,
                      {}};
      if (block.used) {
        shown.state = pending.count(&block) != 0 ? PoolBlock::State::kPendingFree
                                                 : PoolBlock::State::kAllocated;
      }
      if (shown.has_stream) {
        shown.stream = clocks_[static_cast<size_t>(block.owner)]->stream();
      }
      segments.back().blocks.push_back(shown);
    });
  }
  return segments;
}

void CachingPool::report_full_locked(int64_t bytes) {
  ++stats_.num_ooms;
  const int64_t allocated = allocated_bytes_locked();
  const int64_t reserved = reserved_bytes_locked();
  std::string text = "the pool has no " + format_bytes(bytes) + " in one block: of " +
                     format_bytes(reserved) + " mapped, " + format_bytes(allocated) + " are in use";
  const int64_t total = pages_->total_bytes();
  text += limit_bytes_ == kNoLimit ? "" : ", the limit is " + format_bytes(limit_bytes_);
  text += bytes <= total ? "" : ", the device has " + format_bytes(total) + " in all";
  text += refusal_.empty() ? "" : "; " + refusal_;
  throw OutOfMemory(text + ": free some of it, raise the limit, or use smaller inputs");
}

void CachingPool::check_locked() const {
  if (!check_) {
    return;
  }
  small_.check_valid();
  large_.check_valid();
  int64_t used_bytes = stats_.pending_bytes;
  for (const auto& [address, allocation] : allocations_) {
    used_bytes += allocation.block->bytes;
  }
  if (used_bytes != small_.used_bytes() + large_.used_bytes()) {
    throw UseError("the pool's blocks hold " + format_bytes(used_bytes) + ", its heaps count " +
                   format_bytes(small_.used_bytes() + large_.used_bytes()));
  }
}

}  // namespace blockswap
