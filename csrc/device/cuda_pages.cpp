// Pages through the virtual memory calls of CUDA's driver and, after hipify, of HIP. None of them
// waits for running kernels, in contrast to cudaFree.

#include <algorithm>
#include <vector>

#include "cuda_guard.h"
#include "pages.h"

namespace blockswap {
namespace {

// Large ones are mapped faster, small ones are given back more often: of one that two blocks have
// a part of, what the first leaves stays mapped.
constexpr int64_t kMostBatchBytes = int64_t{8} << 20;

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
    batches_ = Batches(page_bytes_, std::max(page_bytes_, kMostBatchBytes));
    find_readers();
  }

  int64_t granularity_bytes() const override { return page_bytes_; }
  bool is_sparse() const override { return true; }
  int64_t total_bytes() const override { return total_bytes_; }
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
                 ("cuMemAddressReserve of " + format_bytes(bytes)).c_str());
    return (uint64_t)address;
  }
  void release(uint64_t address, int64_t bytes) noexcept override {
    (void)driver_.release(pointer_to(address), static_cast<size_t>(bytes));
  }

  void map(uint64_t address, int64_t bytes) override {
    DeviceGuard guard(index_);
    int64_t mapped = 0;
    try {
      for (const int64_t batch : batches_.cut(bytes)) {
        map_batch(address + static_cast<uint64_t>(mapped), batch);
        mapped += batch;
      }
      check_driver(driver_.set_access(pointer_to(address), static_cast<size_t>(bytes),
                                      readers_.data(), readers_.size()),
                   "cuMemSetAccess");
    } catch (const OutOfMemory& error) {
      unmap(address, mapped);
      size_t free_bytes = 0;
      size_t total_bytes = 0;
      (void)cudaMemGetInfo(&free_bytes, &total_bytes);
      throw OutOfMemory("GPU " + std::to_string(index_) + " maps no " + format_bytes(bytes) +
                        " more (" + format_bytes(static_cast<int64_t>(free_bytes)) + " of " +
                        format_bytes(static_cast<int64_t>(total_bytes)) +
                        " free): " + error.what());
    } catch (...) {
      unmap(address, mapped);
      throw;
    }
  }
  void unmap(uint64_t address, int64_t bytes) noexcept override {
    // The driver unmaps what one call has mapped, no less and no more.
    for (const PageRange& batch : batches_.take(address, bytes)) {
      (void)driver_.unmap(pointer_to(batch.address), static_cast<size_t>(batch.bytes));
    }
  }
  PageRange whole(uint64_t address, int64_t bytes, int64_t at_least_bytes) const override {
    return batches_.whole(address, bytes, at_least_bytes);
  }

 private:
  static CUmemLocation location_of(int index) {
    CUmemLocation location{};
    location.type = CU_MEM_LOCATION_TYPE_DEVICE;
    location.id = index;
    return location;
  }
  CUmemAllocationProp memory_kind() const {
    CUmemAllocationProp kind{};
    kind.type = CU_MEM_ALLOCATION_TYPE_PINNED;
    kind.location = location_of(index_);
    return kind;
  }

  // Who may read and write: this GPU and every other one that can. cudaDeviceEnablePeerAccess does
  // not reach pages, and PyTorch tells no allocator of ours when it enables a pair. It costs some
  // 0.1 ms per peer and map().
  void find_readers() {
    int num_devices = 0;
    check_cuda(cudaGetDeviceCount(&num_devices), "cudaGetDeviceCount");
    for (int device = 0; device < num_devices; ++device) {
      int can = device == index_ ? 1 : 0;
      if (can == 0) {
        check_cuda(cudaDeviceCanAccessPeer(&can, device, index_), "cudaDeviceCanAccessPeer");
      }
      if (can != 0) {
        CUmemAccessDesc access{};
        access.location = location_of(device);
        access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
        readers_.push_back(access);
      }
    }
  }

  void map_batch(uint64_t address, int64_t bytes) {
    const CUmemAllocationProp kind = memory_kind();
    CUmemGenericAllocationHandle memory{};
    check_driver(driver_.create(&memory, static_cast<size_t>(bytes), &kind, 0), "cuMemCreate");
    const CUresult status =
        driver_.map(pointer_to(address), static_cast<size_t>(bytes), 0, memory, 0);
    // From here the mapping alone keeps the memory: to unmap is to give it back.
    (void)driver_.destroy(memory);
    check_driver(status, "cuMemMap");
    batches_.note(address, bytes);
  }

  int index_;
  Driver driver_;
  int64_t page_bytes_ = 0;
  Batches batches_{0, 0};
  int64_t total_bytes_ = 0;
  std::vector<CUmemAccessDesc> readers_;
};

bool can_map_pages([[maybe_unused]] int index) {
#ifndef USE_ROCM
  check_cuda(cudaFree(nullptr), "cudaFree");  // the driver's calls need it to be initialized
  const auto get_device = GPU_DRIVER(cuDeviceGet);
  const auto get_attribute = GPU_DRIVER(cuDeviceGetAttribute);
  CUdevice device{};
  int can = 0;
  check_driver(get_device(&device, index), "cuDeviceGet");
  check_driver(get_attribute(&can, CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED, device),
               "cuDeviceGetAttribute");
  return can != 0;
#elif HIP_VERSION >= 60000000
  int can = 0;
  check_cuda(hipDeviceGetAttribute(&can, hipDeviceAttributeVirtualMemoryManagementSupported, index),
             "hipDeviceGetAttribute");
  return can != 0;
#else
  return true;  // this HIP cannot be asked
#endif
}

}  // namespace

std::unique_ptr<Pages> make_gpu_pages(int index, int64_t page_bytes) {
  DeviceGuard guard(index);
  return can_map_pages(index) ? std::make_unique<GpuPages>(index, page_bytes) : nullptr;
}

}  // namespace blockswap
