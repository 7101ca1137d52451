#include "fake_memory.h"
#include "fake_poison.h"

#include <ATen/core/CachingHostAllocator.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

namespace fake {
namespace {

// Pinned host memory: plain memory whose addresses are remembered. PyTorch asks for it in
// tensor.to("cpu", non_blocking=True) and pin_memory().
struct PinnedAllocator final : at::HostAllocator {
  static std::mutex& mutex() {
    static auto* instance = new std::mutex;  // leaked: owners may outlive the process's end
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

bool is_pinned(const void* address) {
  const auto key = reinterpret_cast<uintptr_t>(address);
  std::lock_guard lock(PinnedAllocator::mutex());
  auto next = PinnedAllocator::ranges().upper_bound(key);
  return next != PinnedAllocator::ranges().begin() &&
         key < std::prev(next)->first + std::prev(next)->second;
}

c10::Allocator* pinned_allocator() { return &pinned_allocator_instance; }

}  // namespace fake
