#include "pluggable.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

#include "../error.h"

namespace blockswap {
namespace {

using SharedPool = std::shared_ptr<CachingPool>;

// The mutex comes before those of the pools.
struct Pluggable {
  std::mutex mutex;
  std::map<int, SharedPool> pools;
};

Pluggable& pluggable() {
  static auto* all = new Pluggable;  // never destroyed: PyTorch frees tensors until the very end
  return *all;
}

std::vector<SharedPool> all_pools() {
  std::lock_guard lock(pluggable().mutex);
  std::vector<SharedPool> pools;
  for (const auto& [device, pool] : pluggable().pools) {
    if (pool != nullptr) {
      pools.push_back(pool);
    }
  }
  return pools;
}

SharedPool make_pool([[maybe_unused]] int device) {
#if BS_WITH_GPU
  std::shared_ptr<Device> gpu = make_gpu_device(device);
  std::unique_ptr<Pages> pages = make_gpu_pages(device, 0);
  if (pages == nullptr) {
    pages = make_segment_pages(gpu);
  }
  return std::make_shared<CachingPool>(std::move(gpu), std::move(pages), CachingPool::kNoLimit);
#else
  throw DeviceError(
      "this build of blockswap has no GPU support: reinstall it beside a CUDA or ROCm build of "
      "PyTorch");
#endif
}

}  // namespace

SharedPool pluggable_pool(int device) {
  std::lock_guard lock(pluggable().mutex);
  SharedPool& pool = pluggable().pools[device];
  if (pool == nullptr) {
    pool = make_pool(device);
  }
  return pool;
}

void set_pluggable_pool(int device, SharedPool pool) {
  std::lock_guard lock(pluggable().mutex);
  std::swap(pluggable().pools[device], pool);  // the old one dies after the lock: it may wait long
}

bool is_pluggable(const CachingPool& pool) {
  const std::vector<SharedPool> pools = all_pools();
  return std::any_of(pools.begin(), pools.end(),
                     [&pool](const SharedPool& each) { return each.get() == &pool; });
}

void record_pluggable_use(void* address, Device::Stream stream) {
  for (const SharedPool& pool : all_pools()) {
    if (pool->try_record_use(address, stream)) {
      return;
    }
  }
}

void trim_pluggable_pools() {
  for (const SharedPool& pool : all_pools()) {
    pool->trim(0);
  }
}

}  // namespace blockswap
