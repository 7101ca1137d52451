#include "fake_memory.h"

#include "fake_poison.h"
#include "fake_streams.h"

#include <ATen/core/CachingHostAllocator.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

namespace fake {
namespace {

size_t round_up(size_t bytes) {
  return (bytes + kAlignmentBytes - 1) / kAlignmentBytes * kAlignmentBytes;
}

Quarantine& quarantine() {
  static auto* instance = new Quarantine;  // leaked: workers may free while the process exits
  return *instance;
}

// Owns one allocation's bytes. Shared by its DataPtr and the tasks that hold it.
struct Block {
  Block(int on_device, size_t size)
      : device(on_device), bytes(size), address(allocate_poisoned(size)) {}
  ~Block() { quarantine().add(address, bytes); }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  const int device;
  const size_t bytes;
  void* const address;
};

struct Accounts {
  std::mutex mutex;
  std::map<uintptr_t, std::shared_ptr<Block>> blocks;  // by first address
  MemoryUse use[kNumDevices] = {{0, 0, kDefaultLimitBytes}, {0, 0, kDefaultLimitBytes}};
  OutOfMemoryCallback on_out_of_memory;
  std::vector<OutOfMemoryObserver> observers;
  int64_t num_allocations = 0;
  int64_t failing = -1;
};

Accounts& accounts() {
  static auto* instance = new Accounts;  // leaked, as above
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

bool try_reserve(int device, int64_t bytes) {
  std::lock_guard lock(accounts().mutex);
  MemoryUse& use = accounts().use[device];
  if (use.used_bytes + bytes > std::min(use.limit_bytes, use.share_bytes)) {
    return false;
  }
  use.used_bytes += bytes;
  use.peak_bytes = std::max(use.peak_bytes, use.used_bytes);
  return true;
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
                   std::min(use.limit_bytes, use.share_bytes), " bytes are in use");
}

bool is_failing() {
  std::lock_guard lock(accounts().mutex);
  return accounts().num_allocations++ == accounts().failing;
}

void* device_malloc(int device, size_t bytes) {
  if (is_failing()) {
    out_of_memory(device, bytes, ", as the test wants it");
  }
  const auto reserved_bytes = static_cast<int64_t>(bytes);
  while (!try_reserve(device, reserved_bytes)) {
    OutOfMemoryCallback callback;
    {
      std::lock_guard lock(accounts().mutex);
      callback = accounts().on_out_of_memory;
    }
    if (!callback || !callback(device, bytes)) {
      out_of_memory(device, bytes, "");
    }
  }
  auto block = std::make_shared<Block>(device, bytes);
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
  accounts().use[block->device].used_bytes -= static_cast<int64_t>(block->bytes);
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
  void emptyCache(c10::MempoolId_t /*pool*/) override {}
  void recordStream(const c10::DataPtr& /*data*/, c10::Stream /*stream*/) override {}  // see hold()
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex device) override {
    c10::CachingDeviceAllocator::DeviceStats stats;
    const MemoryUse use = memory_use(device);
    for (auto* array : {&stats.allocated_bytes, &stats.reserved_bytes, &stats.active_bytes}) {
      (*array)[0].current = use.used_bytes;
      (*array)[0].peak = use.peak_bytes;
    }
    return stats;
  }
  void resetAccumulatedStats(c10::DeviceIndex /*device*/) override {}
  void resetPeakStats(c10::DeviceIndex device) override { reset_peak(device); }
  // Not marked override: not every supported PyTorch declares it.
  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex device) {
    const MemoryUse use = memory_use(device);
    return {static_cast<size_t>(std::max<int64_t>(0, use.limit_bytes - use.used_bytes)),
            static_cast<size_t>(use.limit_bytes)};
  }
};

DeviceAllocator device_allocator_instance;
REGISTER_ALLOCATOR(c10::kPrivateUse1, &device_allocator_instance);

// Pinned host memory: plain memory whose addresses are remembered. PyTorch asks for it in
// tensor.to("cpu", non_blocking=True) and pin_memory().
struct PinnedAllocator final : at::HostAllocator {
  static std::mutex& mutex() {
    static auto* instance = new std::mutex;  // leaked, as above
    return *instance;
  }
  static std::map<uintptr_t, size_t>& ranges() {
    static auto* instance = new std::map<uintptr_t, size_t>;
    return *instance;
  }
  static void release(void* address) {
    if (address != nullptr) {
      std::lock_guard lock(mutex());
      ranges().erase(reinterpret_cast<uintptr_t>(address));
      std::free(address);
    }
  }
  at::DataPtr allocate(size_t bytes) override {
    void* address = bytes == 0 ? nullptr : allocate_poisoned(round_up(bytes));
    if (address != nullptr) {
      std::lock_guard lock(mutex());
      ranges()[reinterpret_cast<uintptr_t>(address)] = round_up(bytes);
    }
    return {address, address, &release, c10::Device(c10::kCPU)};
  }
  at::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }
  // Nothing to remember: a copy's task owns the host storage until it ran.
  bool record_event(void* /*address*/, void* /*context*/, c10::Stream /*stream*/) override {
    return true;
  }
  void empty_cache() override {}
  at::HostStats get_stats() override { return {}; }
  void reset_accumulated_stats() override {}
  void reset_peak_stats() override {}
};

PinnedAllocator pinned_allocator_instance;
REGISTER_HOST_ALLOCATOR(c10::DeviceType::PrivateUse1, &pinned_allocator_instance)

}  // namespace

MemoryUse memory_use(int device) {
  std::lock_guard lock(accounts().mutex);
  return accounts().use[device];
}

void reset_peak(int device) {
  std::lock_guard lock(accounts().mutex);
  accounts().use[device].peak_bytes = accounts().use[device].used_bytes;
}

void set_limit(int device, int64_t limit_bytes) {
  std::lock_guard lock(accounts().mutex);
  accounts().use[device].limit_bytes = limit_bytes;
}

void set_share(int device, int64_t share_bytes) {
  std::lock_guard lock(accounts().mutex);
  accounts().use[device].share_bytes = share_bytes;
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

int64_t num_writes_after_free() { return quarantine().num_written(); }

std::shared_ptr<const void> hold(const c10::DataPtr& data) {
  return data.get_deleter() == &device_free ? find_block(data.get()) : nullptr;
}

int device_of(const void* address) {
  const auto block = find_block(address);
  return block ? block->device : -1;
}

c10::DeviceAllocator* device_allocator() { return &device_allocator_instance; }

bool is_pinned(const void* address) {
  const auto key = reinterpret_cast<uintptr_t>(address);
  std::lock_guard lock(PinnedAllocator::mutex());
  auto next = PinnedAllocator::ranges().upper_bound(key);
  return next != PinnedAllocator::ranges().begin() &&
         key < std::prev(next)->first + std::prev(next)->second;
}

c10::Allocator* pinned_allocator() { return &pinned_allocator_instance; }

}  // namespace fake
