#include "pluggable.h"

#include <exception>
#include <map>
#include <mutex>
#include <utility>

#include "../error.h"
#include "../os.h"

namespace blockswap {
namespace {

// The mutex comes before those of the pools.
struct Pluggable {
  std::mutex mutex;
  std::map<int, std::shared_ptr<CachingPool>> pools;
  std::string error;
};

Pluggable& pluggable() {
  static auto* all = new Pluggable;  // never destroyed: PyTorch frees tensors until the very end
  return *all;
}

std::shared_ptr<CachingPool> make_pool([[maybe_unused]] int device) {
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

void keep_error(const std::exception& error) {
  std::string text = error.what();  // of a Python error: takes Python's lock, so not under ours
  std::lock_guard lock(pluggable().mutex);
  pluggable().error.swap(text);
}

Device::Stream stream_of(void* stream) {
  return Device::Stream{reinterpret_cast<uint64_t>(stream)};
}

}  // namespace

std::shared_ptr<CachingPool> pluggable_pool(int device) {
  std::lock_guard lock(pluggable().mutex);
  std::shared_ptr<CachingPool>& pool = pluggable().pools[device];
  if (pool == nullptr) {
    pool = make_pool(device);
  }
  return pool;
}

void set_pluggable_pool(int device, std::shared_ptr<CachingPool> pool) {
  std::lock_guard lock(pluggable().mutex);
  std::swap(pluggable().pools[device], pool);  // the old one dies after the lock: it may wait long
}

std::string take_pluggable_error() {
  std::lock_guard lock(pluggable().mutex);
  return std::exchange(pluggable().error, {});
}

}  // namespace blockswap

using namespace blockswap;

void* blockswap_alloc(ssize_t bytes, int device, void* stream) {
  try {
    return bytes == 0 ? nullptr : pluggable_pool(device)->allocate(bytes, stream_of(stream));
  } catch (const std::exception& error) {
    keep_error(error);
    return nullptr;
  }
}

void blockswap_free(void* address, ssize_t, int device, void* stream) {
  if (address == nullptr || os::process_is_exiting()) {
    return;  // the driver takes all memory when the process ends
  }
  try {
    pluggable_pool(device)->free(address, stream_of(stream));
  } catch (const std::exception& error) {
    keep_error(error);
  }
}
