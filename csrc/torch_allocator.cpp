#include "torch_allocator.h"

#include <c10/util/Exception.h>

#include <exception>

#include "error.h"
#include "os.h"

#if BS_WITH_GPU
#include <c10/cuda/CUDAGraphsC10Utils.h>
#endif

namespace blockswap {
namespace {

Device::Stream stream_of(TorchStream stream) {
  return Device::Stream{reinterpret_cast<uint64_t>(stream)};
}

// Runs what must not throw.
template <typename Body>
void warn_instead(const char* what, const Body& body) {
  if (os::process_is_exiting()) {
    return;  // the driver takes all memory when the process ends
  }
  try {
    body();
  } catch (const std::exception& error) {
    TORCH_WARN("blockswap could not ", what, ": ", error.what());
  }
}

bool is_capturing() {
#if BS_WITH_GPU
  return c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None;
#else
  return false;
#endif
}

}  // namespace

void* torch_alloc(size_t bytes, int device, TorchStream stream) {
  if (bytes == 0) {
    return nullptr;
  }
  try {
    return pluggable_pool(device)->allocate(static_cast<int64_t>(bytes), stream_of(stream));
  } catch (const OutOfMemory& error) {
    TORCH_CHECK_WITH(OutOfMemoryError, false, error.what());
  }
}

void torch_free(void* address, size_t, int device, TorchStream stream) {
  if (address != nullptr) {
    warn_instead("free a tensor's memory",
                 [&] { pluggable_pool(device)->free(address, stream_of(stream)); });
  }
}

// Also called for memory of others: of a tensor made by from_blob, or from before.
void torch_record_stream(void* address, TorchStream stream) {
  record_pluggable_use(address, stream_of(stream));
}

void torch_empty_cache() { trim_pluggable_pools(); }

void torch_set_memory_fraction(double fraction, int device) {
  const auto pool = pluggable_pool(device);
  const int64_t total_bytes = pool->total_bytes();
  TORCH_CHECK(total_bytes != INT64_MAX, "the memory of device ", device,
              " is not known: set a limit in bytes with "
              "blockswap.memory.set_limit()");
  pool->set_limit(static_cast<int64_t>(fraction * static_cast<double>(total_bytes)));
}

void torch_refuse_graphs() {
  throw UseError(
      "CUDA graphs and torch.cuda.use_mem_pool() do not work under blockswap.memory.install(): the "
      "memory of a graph could be handed on while the graph still writes there. Capture in a "
      "process without install()");
}

void* mem_pool_alloc(size_t bytes, int device, TorchStream stream) {
  try {
    const auto pool = pluggable_pool(device);
    return is_capturing() ? pool->allocate_unused(static_cast<int64_t>(bytes), stream_of(stream))
                          : pool->allocate(static_cast<int64_t>(bytes), stream_of(stream));
  } catch (const OutOfMemory&) {
    return nullptr;
  }
}

void mem_pool_free(void* address, size_t, int device, TorchStream) {
  warn_instead("free a segment of a MemPool", [&] { pluggable_pool(device)->free_sync(address); });
}

void install_torch_allocator() {
#if BS_WITH_GPU
  namespace plug = torch::cuda::CUDAPluggableAllocator;
  const auto created = plug::createCustomAllocator(&torch_alloc, &torch_free);
  const auto allocator = std::dynamic_pointer_cast<plug::CUDAPluggableAllocator>(created);
  TORCH_CHECK(allocator != nullptr, "this PyTorch makes another kind of pluggable allocator");
  allocator->set_record_stream_fn(&torch_record_stream);
  allocator->set_reset_fn(&torch_empty_cache);
  allocator->set_memory_fraction_fn(&torch_set_memory_fraction);
  allocator->set_begin_allocate_to_pool([](auto&&...) { torch_refuse_graphs(); });
  plug::changeCurrentAllocator(created);
#else
  throw DeviceError(
      "this build of blockswap has no GPU support: reinstall it beside a CUDA or ROCm build of "
      "PyTorch");
#endif
}

}  // namespace blockswap
