#pragma once

// Status codes of CUDA's runtime, and the calls of its driver.

#ifndef USE_ROCM
#include <cuda.h>
#endif
#include <cuda_runtime.h>

#include <string>

#include "../error.h"

#ifdef USE_ROCM
#define GPU_DRIVER(name) (&name)  // part of HIP's runtime
#else
#define GPU_DRIVER(name) ::blockswap::entry_point<decltype(&name)>(#name)
#endif

namespace blockswap {

// The driver's error codes have the same numbers as the runtime's, on CUDA as on HIP.
inline void check_cuda(cudaError_t status, const char* call) {
  if (status == cudaSuccess) {
    return;
  }
  (void)cudaGetLastError();  // a sticky-free error must not surface in PyTorch's next call
  const std::string text = std::string(call) + ": " + cudaGetErrorString(status);
  if (status == cudaErrorMemoryAllocation) {
    throw OutOfMemory(text);
  }
  throw DeviceError(text);
}

#ifndef USE_ROCM
inline void check_driver(CUresult status, const char* call) {
  check_cuda(static_cast<cudaError_t>(status), call);
}

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
#else
inline void check_driver(cudaError_t status, const char* call) { check_cuda(status, call); }
#endif

}  // namespace blockswap
