// Pages through the virtual memory calls of CUDA's driver and, after hipify, of HIP. None of them
// waits for running kernels, in contrast to cudaFree.

#ifndef USE_ROCM
#include <cuda.h>
#endif
#include <cuda_runtime.h>

#include <algorithm>

#include "cuda_guard.h"
#include "pages.h"

#ifdef USE_ROCM
#define GPU_DRIVER(name) (&name)  // part of HIP's runtime
#else
#define GPU_DRIVER(name) entry_point<decltype(&name)>(#name)
#endif

namespace blockswap {
namespace {

#ifndef USE_ROCM
// Asked for at run time: what links to the driver cannot be imported on a machine without one.
template <typename Function>
Function entry_point(const char* name) {
  constexpr unsigned kVersion = 12000;  // the oldest CUDA that PyTorch comes with
  void* address = nullptr;
  cudaDriverEntryPointQueryResult found{};
  check_cuda(cudaGetDriverEntryPointByVersion(name, &address, kVersion, cudaEnableDefault, &found),
             name);
  if (found != cudaDriverEntryPointSuccess) {
    throw DeviceError(std::string("the GPU's driver has no ") + name +
                      ": update it to one for CUDA 12 or later");
  }
  return reinterpret_cast<Function>(address);
}
#endif

struct Driver {
  decltype(&cuMemGetAllocationGranularity) granularity = GPU_DRIVER(cuMemGetAllocationGranularity);
  decltype(&cuMemAddressReserve) reserve = GPU_DRIVER(cuMemAddressReserve);
  decltype(&cuMemAddressFree) release = GPU_DRIVER(cuMemAddressFree);
  decltype(&cuMemCreate) create = GPU_DRIVER(cuMemCreate);
  decltype(&cuMemRelease) destroy = GPU_DRIVER(cuMemRelease);
  decltype(&cuMemMap) map = GPU_DRIVER(cuMemMap);
  decltype(&cuMemSetAccess) set_access = GPU_DRIVER(cuMemSetAccess);
  decltype(&cuMemUnmap) unmap = GPU_DRIVER(cuMemUnmap);
};

void check_driver(CUresult status, const std::string& call) {
  check_cuda(static_cast<cudaError_t>(status), call);
}

// An integer on CUDA, a pointer on HIP.
CUdeviceptr pointer_to(uint64_t address) { return (CUdeviceptr)address; }

class GpuPages final : public Pages {
 public:
  GpuPages(int index, int64_t page_bytes) : index_(index) {
    DeviceGuard guard(index_);
    check_cuda(cudaFree(nullptr), "cudaFree");  // the driver's calls need the context to exist
    size_t free_bytes = 0;
    size_t total_bytes = 0;
    check_cuda(cudaMemGetInfo(&free_bytes, &total_bytes), "cudaMemGetInfo");
    total_bytes_ = static_cast<int64_t>(total_bytes);
    size_t unit = 0;
    const CUmemAllocationProp kind = memory_kind();
    check_driver(driver_.granularity(&unit, &kind, CU_MEM_ALLOC_GRANULARITY_MINIMUM),
                 "cuMemGetAllocationGranularity");
    page_bytes_ = static_cast<int64_t>(unit);
    while (page_bytes_ < page_bytes) {
      page_bytes_ *= 2;
    }
  }

  int64_t granularity_bytes() const override { return page_bytes_; }
  bool is_sparse() const override { return true; }
  int64_t range_bytes(int64_t bytes) const override {
    constexpr int64_t kRangeFactor = 4;  // addresses per byte of memory
    const int64_t wanted = std::max(bytes, kRangeFactor * total_bytes_);
    return (wanted + page_bytes_ - 1) / page_bytes_ * page_bytes_;
  }

  uint64_t reserve(int64_t bytes) override {
    DeviceGuard guard(index_);
    CUdeviceptr address{};
    check_driver(driver_.reserve(&address, static_cast<size_t>(bytes),
                                 static_cast<size_t>(page_bytes_), CUdeviceptr{}, 0),
                 "cuMemAddressReserve of " + format_bytes(bytes));
    return (uint64_t)address;
  }
  void release(uint64_t address, int64_t bytes) noexcept override {
    (void)driver_.release(pointer_to(address), static_cast<size_t>(bytes));
  }

  void map(uint64_t address, int64_t bytes) override {
    DeviceGuard guard(index_);
    int64_t mapped = 0;
    try {
      for (; mapped < bytes; mapped += page_bytes_) {
        map_page(address + static_cast<uint64_t>(mapped));
      }
      CUmemAccessDesc access{};
      access.location = memory_kind().location;
      access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
      check_driver(driver_.set_access(pointer_to(address), static_cast<size_t>(bytes), &access, 1),
                   "cuMemSetAccess");
    } catch (const DeviceError& error) {
      unmap(address, mapped);
      size_t free_bytes = 0;
      size_t total_bytes = 0;
      (void)cudaMemGetInfo(&free_bytes, &total_bytes);
      throw DeviceError("GPU " + std::to_string(index_) + " maps no " + format_bytes(bytes) +
                        " more (" + format_bytes(static_cast<int64_t>(free_bytes)) + " of " +
                        format_bytes(static_cast<int64_t>(total_bytes)) +
                        " free): " + error.what());
    }
  }
  void unmap(uint64_t address, int64_t bytes) noexcept override {
    // Page by page: the driver unmaps what one call has mapped, no less and no more.
    for (int64_t offset = 0; offset < bytes; offset += page_bytes_) {
      (void)driver_.unmap(pointer_to(address + static_cast<uint64_t>(offset)),
                          static_cast<size_t>(page_bytes_));
    }
  }

  // Throws DeviceError where pages cannot be mapped.
  void try_one() {
    const uint64_t address = reserve(page_bytes_);
    try {
      map(address, page_bytes_);
    } catch (const DeviceError&) {
      release(address, page_bytes_);
      throw;
    }
    unmap(address, page_bytes_);
    release(address, page_bytes_);
  }

 private:
  CUmemAllocationProp memory_kind() const {
    CUmemAllocationProp kind{};
    kind.type = CU_MEM_ALLOCATION_TYPE_PINNED;
    kind.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
    kind.location.id = index_;
    return kind;
  }

  void map_page(uint64_t address) {
    const auto bytes = static_cast<size_t>(page_bytes_);
    const CUmemAllocationProp kind = memory_kind();
    CUmemGenericAllocationHandle memory{};
    check_driver(driver_.create(&memory, bytes, &kind, 0), "cuMemCreate");
    const CUresult status = driver_.map(pointer_to(address), bytes, 0, memory, 0);
    // From here the mapping alone keeps the memory: to unmap is to give it back.
    (void)driver_.destroy(memory);
    check_driver(status, "cuMemMap");
  }

  int index_;
  Driver driver_;
  int64_t page_bytes_ = 0;
  int64_t total_bytes_ = 0;
};

}  // namespace

// No attribute says on every platform whether pages can be mapped: try it with one.
std::unique_ptr<Pages> make_gpu_pages(int index, int64_t page_bytes) {
  try {
    auto pages = std::make_unique<GpuPages>(index, page_bytes);
    pages->try_one();
    return pages;
  } catch (const DeviceError&) {
    return nullptr;
  }
}

}  // namespace blockswap
