// CUDA and, after hipify, HIP. Raw runtime calls only, no torch headers: nvcc and hipcc check this
// file without a GPU build of PyTorch.

#include <cuda_runtime.h>

#include <cmath>

#include "../error.h"
#include "cuda_guard.h"
#include "device.h"

namespace blockswap {
namespace {

cudaStream_t stream_of(Device::Stream stream) { return reinterpret_cast<cudaStream_t>(stream); }
cudaEvent_t event_of(Device::Event event) { return reinterpret_cast<cudaEvent_t>(event); }

bool is_ready(cudaError_t status, const char* call) {
  if (status == cudaErrorNotReady) {
    (void)cudaGetLastError();
    return false;
  }
  check_cuda(status, call);
  return true;
}

// Of a call on a stream. Nothing promises what the driver says of one that was destroyed; these two
// are what it says.
void check_stream(cudaError_t status, const char* call) {
  if (status == cudaErrorInvalidResourceHandle || status == cudaErrorContextIsDestroyed) {
    (void)cudaGetLastError();
    throw DeadStream(std::string(call) + ": this stream was destroyed (" +
                     cudaGetErrorString(status) + ")");
  }
  check_cuda(status, call);
}

// Every call that takes a stream sets the device: stream 0 is that of the current one.
class GpuDevice final : public Device {
 public:
  explicit GpuDevice(int index) : index_(index) {}

  void* allocate(int64_t bytes) override {
    DeviceGuard guard(index_);
    void* address = nullptr;
    const cudaError_t status = cudaMalloc(&address, static_cast<size_t>(bytes));
    if (status != cudaSuccess) {
      (void)cudaGetLastError();
      size_t free_bytes = 0;
      size_t total_bytes = 0;
      (void)cudaMemGetInfo(&free_bytes, &total_bytes);
      throw OutOfMemory("GPU " + std::to_string(index_) + " has no " + format_bytes(bytes) +
                        " in one range for residents and ring (" +
                        format_bytes(static_cast<int64_t>(free_bytes)) + " of " +
                        format_bytes(static_cast<int64_t>(total_bytes)) +
                        " free): lower vram=, or free memory that other programs hold");
    }
    return address;
  }
  void deallocate(void* address) noexcept override { (void)cudaFree(address); }

  Stream make_stream() override {
    DeviceGuard guard(index_);
    int least = 0;
    int greatest = 0;
    check_cuda(cudaDeviceGetStreamPriorityRange(&least, &greatest),
               "cudaDeviceGetStreamPriorityRange");
    cudaStream_t stream = nullptr;
    check_cuda(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, greatest),
               "cudaStreamCreateWithPriority");
    return Stream{reinterpret_cast<uint64_t>(stream)};
  }
  void destroy_stream(Stream stream) noexcept override {
    (void)cudaStreamDestroy(stream_of(stream));
  }

  Event make_event(EventKind kind) override {
    DeviceGuard guard(index_);
    cudaEvent_t event = nullptr;
    const unsigned flags = kind == EventKind::kTimed ? cudaEventDefault : cudaEventDisableTiming;
    check_cuda(cudaEventCreateWithFlags(&event, flags), "cudaEventCreateWithFlags");
    return Event{reinterpret_cast<uint64_t>(event)};
  }
  void destroy_event(Event event) noexcept override { (void)cudaEventDestroy(event_of(event)); }
  void record(Event event, Stream stream) override {
    DeviceGuard guard(index_);
    check_stream(cudaEventRecord(event_of(event), stream_of(stream)), "cudaEventRecord");
  }
  void wait(Stream stream, Event event) override {
    DeviceGuard guard(index_);
    check_stream(cudaStreamWaitEvent(stream_of(stream), event_of(event), 0), "cudaStreamWaitEvent");
  }
  bool is_done(Event event) override {
    return is_ready(cudaEventQuery(event_of(event)), "cudaEventQuery");
  }
  bool is_idle(Stream stream) override {
    DeviceGuard guard(index_);
    const cudaError_t status = cudaStreamQuery(stream_of(stream));
    if (status != cudaErrorNotReady) {
      check_stream(status, "cudaStreamQuery");
    }
    return is_ready(status, "cudaStreamQuery");
  }
  double seconds_between(Event begin, Event end) override {
    float ms = 0.0F;
    if (cudaEventElapsedTime(&ms, event_of(begin), event_of(end)) != cudaSuccess) {
      (void)cudaGetLastError();
      return NAN;
    }
    return static_cast<double>(ms) / 1e3;
  }

  void synchronize(Stream stream) override {
    DeviceGuard guard(index_);
    check_stream(cudaStreamSynchronize(stream_of(stream)), "cudaStreamSynchronize");
  }
  void synchronize_all() override {
    DeviceGuard guard(index_);
    check_cuda(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  }
  void synchronize(Event event) override {
    check_cuda(cudaEventSynchronize(event_of(event)), "cudaEventSynchronize");
  }

  void enqueue_copy(Stream stream, void* target, const void* host, int64_t bytes) override {
    DeviceGuard guard(index_);
    check_cuda(cudaMemcpyAsync(target, host, static_cast<size_t>(bytes), cudaMemcpyHostToDevice,
                               stream_of(stream)),
               "cudaMemcpyAsync");
  }
  void enqueue_fill(Stream stream, void* target, uint8_t value, int64_t bytes) override {
    DeviceGuard guard(index_);
    check_cuda(cudaMemsetAsync(target, value, static_cast<size_t>(bytes), stream_of(stream)),
               "cudaMemsetAsync");
  }

  bool pin(void* host, int64_t bytes) override {
    DeviceGuard guard(index_);
    // Portable: pinned for every context, so that other GPUs copy from the same image at speed.
    const bool ok =
        cudaHostRegister(host, static_cast<size_t>(bytes), cudaHostRegisterPortable) == cudaSuccess;
    if (!ok) {
      (void)cudaGetLastError();
    }
    return ok;
  }
  void unpin(void* host) noexcept override {
    if (cudaHostUnregister(host) != cudaSuccess) {
      (void)cudaGetLastError();
    }
  }

 private:
  int index_;
};

}  // namespace

std::shared_ptr<Device> make_gpu_device(int index) { return std::make_shared<GpuDevice>(index); }

}  // namespace blockswap
