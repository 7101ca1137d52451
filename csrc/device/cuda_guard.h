#pragma once

#include <cuda_runtime.h>

#include <string>

#include "../error.h"

namespace blockswap {

// The driver's error codes have the same numbers as the runtime's, on CUDA as on HIP.
inline void check_cuda(cudaError_t status, const std::string& call) {
  if (status != cudaSuccess) {
    (void)cudaGetLastError();  // a sticky-free error must not surface in PyTorch's next call
    throw DeviceError(call + ": " + cudaGetErrorString(status));
  }
}

// Makes a device the current one: the default stream is that of the current device. Restores the
// caller's device: PyTorch code around us relies on it.
class DeviceGuard {
 public:
  explicit DeviceGuard(int index) {
    check_cuda(cudaGetDevice(&previous_), "cudaGetDevice");
    if (previous_ != index) {
      check_cuda(cudaSetDevice(index), "cudaSetDevice");
    }
    changed_ = previous_ != index;
  }
  ~DeviceGuard() {
    if (changed_) {
      (void)cudaSetDevice(previous_);
    }
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

}  // namespace blockswap
