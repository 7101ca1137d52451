#include "fake_memory.h"

#include "fake_poison.h"
#include "fake_streams.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

namespace fake {
namespace {

// What an allocation counts as, and its place if it comes from the cache.
struct Room {
  int64_t bytes;
  std::optional<uint64_t> place;
};

// Owns one allocation's bytes. Shared by its DataPtr and the tasks that hold it.
struct Block {
  Block(int on_device, size_t size, Room its_room)
      : device(on_device), bytes(size), room(its_room), address(allocate_poisoned(size)) {}
  ~Block() { Quarantine::of_process().add(address, bytes); }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  const int device;
  const size_t bytes;
  const Room room;
  void* const address;
};

struct Accounts {
  std::mutex mutex;
  std::map<uintptr_t, std::shared_ptr<Block>> blocks;  // by first address
  MemoryUse use[kNumDevices];
  Cache caches[kNumDevices];
  bool keeps_freed = false;
  OutOfMemoryCallback on_out_of_memory;
  std::vector<OutOfMemoryObserver> observers;
  int64_t num_allocations = 0;
  int64_t failing = -1;
};

Accounts& accounts() {
  static auto* instance = new Accounts;  // leaked: workers may free while the process exits
  return *instance;
}

std::shared_ptr<Block> find_block(const void* address) {
  const auto key = reinterpret_cast<uintptr_t>(address);
  std::lock_guard lock(accounts().mutex);
  auto next = accounts().blocks.upper_bound(key);
  if (next == accounts().blocks.begin()) {
    return nullptr;
  }
  const auto& [begin, block] = *std::prev(next);
  return key < begin + block->bytes ? block : nullptr;
}

// pre: the accounts are locked, as for the next two.
void give_back_locked(int device) {
  const auto given = static_cast<int64_t>(accounts().caches[device].give_back());
  accounts().use[device].reserved_bytes -= given;
}

bool try_grow_locked(int device, size_t bytes) {
  MemoryUse& use = accounts().use[device];
  const int64_t grown = use.reserved_bytes + static_cast<int64_t>(bytes);
  if (grown > std::min(use.limit_bytes, use.share_bytes)) {
    return false;
  }
  use.reserved_bytes = grown;
  use.peak_reserved_bytes = std::max(use.peak_reserved_bytes, grown);
  return true;
}

std::optional<uint64_t> try_place_locked(int device, size_t bytes) {
  Cache& cache = accounts().caches[device];
  const int64_t stream = current_stream(device);
  if (auto place = cache.try_take(bytes, stream)) {
    return place;
  }
  const size_t segment_bytes = Cache::segment_bytes(bytes);
  if (!try_grow_locked(device, segment_bytes)) {
    ++accounts().use[device].num_retries;
    give_back_locked(device);
    if (!try_grow_locked(device, segment_bytes)) {
      return std::nullopt;
    }
  }
  return cache.take_new(bytes, stream);
}

std::optional<Room> try_reserve(int device, size_t bytes) {
  std::lock_guard lock(accounts().mutex);
  Room room{static_cast<int64_t>(bytes), std::nullopt};
  if (accounts().keeps_freed) {
    room.place = try_place_locked(device, bytes);
    if (!room.place) {
      return std::nullopt;
    }
    room.bytes = static_cast<int64_t>(accounts().caches[device].bytes_of(*room.place));
  } else if (!try_grow_locked(device, bytes)) {
    return std::nullopt;
  }
  MemoryUse& use = accounts().use[device];
  use.used_bytes += room.bytes;
  use.peak_bytes = std::max(use.peak_bytes, use.used_bytes);
  return room;
}

[[noreturn]] void out_of_memory(int device, size_t bytes, const char* why) {
  std::vector<OutOfMemoryObserver> observers;
  {
    std::lock_guard lock(accounts().mutex);
    ++accounts().use[device].num_ooms;
    observers = accounts().observers;
  }
  const MemoryUse use = memory_use(device);
  for (const auto& observe : observers) {
    observe(device, bytes, use);
  }
  TORCH_CHECK_WITH(OutOfMemoryError, false, "fake out of memory", why, ". Tried to allocate ",
                   bytes, " bytes on device ", device, ": ", use.used_bytes, " of ",
                   std::min(use.limit_bytes, use.share_bytes), " bytes are in use, and ",
                   use.reserved_bytes - use.used_bytes, " cached");
}

bool is_failing() {
  std::lock_guard lock(accounts().mutex);
  return accounts().num_allocations++ == accounts().failing;
}

void* device_malloc(int device, size_t bytes) {
  if (is_failing()) {
    out_of_memory(device, bytes, ", as the test wants it");
  }
  std::optional<Room> room;
  while (!(room = try_reserve(device, bytes))) {
    OutOfMemoryCallback callback;
    {
      std::lock_guard lock(accounts().mutex);
      callback = accounts().on_out_of_memory;
    }
    if (!callback || !callback(device, bytes)) {
      out_of_memory(device, bytes, "");
    }
  }
  auto block = std::make_shared<Block>(device, bytes, *room);
  std::lock_guard lock(accounts().mutex);
  accounts().blocks[reinterpret_cast<uintptr_t>(block->address)] = block;
  return block->address;
}

void device_free(void* address) {
  if (address == nullptr) {
    return;
  }
  std::shared_ptr<Block> block;  // dies after the lock is given back
  std::lock_guard lock(accounts().mutex);
  auto found = accounts().blocks.find(reinterpret_cast<uintptr_t>(address));
  if (found == accounts().blocks.end()) {
    return;  // freed twice by a raw owner; deleters must not throw
  }
  block = std::move(found->second);
  accounts().blocks.erase(found);
  MemoryUse& use = accounts().use[block->device];
  use.used_bytes -= block->room.bytes;
  if (!block->room.place) {
    use.reserved_bytes -= block->room.bytes;
    return;
  }
  accounts().caches[block->device].put(*block->room.place);
  if (!accounts().keeps_freed) {
    give_back_locked(block->device);
  }
}

struct DeviceAllocator final : c10::DeviceAllocator {
  at::DataPtr allocate(size_t bytes) override {
    const int device = current_device();
    void* address = bytes == 0 ? nullptr : device_malloc(device, round_up(bytes));
    const c10::Device where(c10::kPrivateUse1, static_cast<c10::DeviceIndex>(device));
    return {address, address, &device_free, where};
  }
  at::DeleterFnPtr raw_deleter() const override { return &device_free; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t /*pool*/) override { empty_cache(); }
  void recordStream(const c10::DataPtr& /*data*/, c10::Stream /*stream*/) override {}  // see hold()
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex device) override {
    c10::CachingDeviceAllocator::DeviceStats stats;
    const MemoryUse use = memory_use(device);
    for (auto* array : {&stats.allocated_bytes, &stats.active_bytes}) {
      (*array)[0].current = use.used_bytes;
      (*array)[0].peak = use.peak_bytes;
    }
    stats.reserved_bytes[0].current = use.reserved_bytes;
    stats.reserved_bytes[0].peak = use.peak_reserved_bytes;
    stats.num_alloc_retries = use.num_retries;
    stats.num_ooms = use.num_ooms;
    return stats;
  }
  void resetAccumulatedStats(c10::DeviceIndex /*device*/) override {}
  void resetPeakStats(c10::DeviceIndex device) override { reset_peak(device); }
  // Not marked override: not every supported PyTorch declares it.
  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex device) {
    const MemoryUse use = memory_use(device);
    return {static_cast<size_t>(std::max<int64_t>(0, use.limit_bytes - use.reserved_bytes)),
            static_cast<size_t>(use.limit_bytes)};
  }
};

DeviceAllocator device_allocator_instance;
REGISTER_ALLOCATOR(c10::kPrivateUse1, &device_allocator_instance);

}  // namespace

MemoryUse memory_use(int device) {
  std::lock_guard lock(accounts().mutex);
  return accounts().use[device];
}

void reset_peak(int device) {
  std::lock_guard lock(accounts().mutex);
  MemoryUse& use = accounts().use[device];
  use.peak_bytes = use.used_bytes;
  use.peak_reserved_bytes = use.reserved_bytes;
}

void set_limit(int device, int64_t limit_bytes) {
  std::lock_guard lock(accounts().mutex);
  accounts().use[device].limit_bytes = limit_bytes;
}

void set_share(int device, int64_t share_bytes) {
  std::lock_guard lock(accounts().mutex);
  accounts().use[device].share_bytes = share_bytes;
}

void keep_freed(bool keeps) {
  {
    std::lock_guard lock(accounts().mutex);
    accounts().keeps_freed = keeps;
  }
  if (!keeps) {
    empty_cache();
  }
}

void empty_cache() {
  std::lock_guard lock(accounts().mutex);
  for (int device = 0; device < kNumDevices; ++device) {
    give_back_locked(device);
  }
}

std::map<uint64_t, Cache::Piece> cached_pieces(int device) {
  std::lock_guard lock(accounts().mutex);
  return accounts().caches[device].pieces();
}

void set_out_of_memory_callback(OutOfMemoryCallback callback) {
  std::lock_guard lock(accounts().mutex);
  accounts().on_out_of_memory.swap(callback);
}

void attach_out_of_memory_observer(OutOfMemoryObserver observer) {
  std::lock_guard lock(accounts().mutex);
  accounts().observers.push_back(std::move(observer));
}

int64_t num_allocations() {
  std::lock_guard lock(accounts().mutex);
  return accounts().num_allocations;
}

void fail_allocation(int64_t number) {
  std::lock_guard lock(accounts().mutex);
  accounts().failing = number;
}

int64_t num_writes_after_free() { return Quarantine::of_process().num_written(); }

std::shared_ptr<const void> hold(const c10::DataPtr& data) {
  return data.get_deleter() == &device_free ? find_block(data.get()) : nullptr;
}

int device_of(const void* address) {
  const auto block = find_block(address);
  return block ? block->device : -1;
}

c10::DeviceAllocator* device_allocator() { return &device_allocator_instance; }

}  // namespace fake
