#pragma once

#include <cstdint>
#include <memory>
#include <string>

namespace blockswap {

// What the engine needs from an accelerator, and nothing else. Three implementations: cuda.cpp
// (CUDA and HIP), generic.cpp (any torch device with streams, through c10: the fake accelerator of
// the tests) and cpu.cpp (no streams: everything happens at once). One contract test runs them all.
//
// `enqueue_*`, `record` and `wait` return before the work is done; `synchronize` blocks the host.
// Work on one stream runs in order; streams are ordered among each other by events only. Every
// function throws DeviceError with the driver's own message, except the noexcept ones; what takes a
// stream throws DeadStream for one that is known to be destroyed.
class Device {
 public:
  // Opaque: a cudaStream_t, a c10 stream id or nothing, as the implementation likes.
  enum class Stream : uint64_t {};
  enum class Event : uint64_t {};

  Device() = default;
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;
  virtual ~Device() = default;

  // Device memory outside PyTorch's caching allocator, aligned to 256 bytes.
  virtual void* allocate(int64_t bytes) = 0;
  virtual void deallocate(void* address) noexcept = 0;

  virtual Stream make_stream() = 0;
  virtual void destroy_stream(Stream stream) noexcept = 0;

  // An event is a point in a stream. One that was never recorded counts as done. Only a timed one
  // may be given to seconds_between; one that only orders streams is cheaper.
  enum class EventKind { kOrders, kTimed };
  virtual Event make_event(EventKind kind) = 0;
  virtual void destroy_event(Event event) noexcept = 0;
  virtual void record(Event event, Stream stream) = 0;
  virtual void wait(Stream stream, Event event) = 0;
  // Ask without waiting: whether the event's point, or the stream's end, has been reached.
  virtual bool is_done(Event event) = 0;
  virtual bool is_idle(Stream stream) = 0;
  // Both events must be recorded and done; NaN when they are not.
  virtual double seconds_between(Event begin, Event end) = 0;

  virtual void synchronize(Stream stream) = 0;
  virtual void synchronize(Event event) = 0;
  // The host waits for all that was enqueued, on streams that are destroyed by now, too.
  virtual void synchronize_all() = 0;

  virtual void enqueue_copy(Stream stream, void* target, const void* host, int64_t bytes) = 0;
  virtual void enqueue_fill(Stream stream, void* target, uint8_t value, int64_t bytes) = 0;

  // Registers host memory for asynchronous copies. False when the system refuses (locked-memory
  // limit): the range then stays pageable, slower but right.
  virtual bool pin(void* host, int64_t bytes) = 0;
  virtual void unpin(void* host) noexcept = 0;
};

std::shared_ptr<Device> make_cpu_device();
std::shared_ptr<Device> make_gpu_device(int index);  // only with BS_WITH_GPU
std::shared_ptr<Device> make_generic_device(const std::string& type, int index);

}  // namespace blockswap
