#pragma once

#include <mutex>
#include <unordered_map>

#include "cuda_driver.h"

namespace blockswap {

// Makes a device the current one: events are made for it, and the default stream is its. Restores
// what was current before, and no more: PyTorch around us relies on it, and cudaSetDevice would
// give a GPU that this process never used a context of hundreds of megabytes.
class DeviceGuard {
 public:
  explicit DeviceGuard(int index) {
    int current = 0;
    check_cuda(cudaGetDevice(&current), "cudaGetDevice");
    if (current != index) {
      enter(index, current);
      changed_ = true;
    }
  }
  ~DeviceGuard() {
    if (changed_) {
      leave();
    }
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
#ifdef USE_ROCM
  // HIP makes a context only when a GPU is really used.
  void enter(int index, int current) {
    previous_ = current;
    check_cuda(cudaSetDevice(index), "cudaSetDevice");
  }
  void leave() { (void)cudaSetDevice(previous_); }

  int previous_ = 0;
#else
  // The thread's stack of contexts knows "none", too. The runtime follows it.
  struct Contexts {
    Contexts() { check_driver(GPU_DRIVER(cuInit)(0), "cuInit"); }

    decltype(&cuDeviceGet) get_device = GPU_DRIVER(cuDeviceGet);
    decltype(&cuDevicePrimaryCtxRetain) retain = GPU_DRIVER(cuDevicePrimaryCtxRetain);
    decltype(&cuCtxPushCurrent) push = GPU_DRIVER(cuCtxPushCurrent);
    decltype(&cuCtxPopCurrent) pop = GPU_DRIVER(cuCtxPopCurrent);
    std::mutex mutex;
    std::unordered_map<int, CUcontext> of_device;  // retained until the process ends

    CUcontext at(int index) {
      std::lock_guard lock(mutex);
      const auto known = of_device.find(index);
      if (known != of_device.end()) {
        return known->second;
      }
      CUdevice device{};
      check_driver(get_device(&device, index), "cuDeviceGet");
      CUcontext context{};
      check_driver(retain(&context, device), "cuDevicePrimaryCtxRetain");
      return of_device.emplace(index, context).first->second;
    }
  };

  static Contexts& contexts() {
    static auto* all = new Contexts;  // never destroyed: guards are made until the very end
    return *all;
  }
  void enter(int index, int) {
    check_driver(contexts().push(contexts().at(index)), "cuCtxPushCurrent");
  }
  void leave() {
    CUcontext popped{};
    (void)contexts().pop(&popped);
  }
#endif

  bool changed_ = false;
};

}  // namespace blockswap
