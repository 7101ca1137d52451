// Any torch device that has streams, through c10's device-neutral interface. In this tree it drives
// the fake accelerator of the tests; it is not tuned, a GPU has cuda.cpp.

#include <ATen/core/Tensor.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <cmath>

#include "../error.h"
#include "device.h"

namespace blockswap {
namespace {

class GenericDevice final : public Device {
 public:
  explicit GenericDevice(c10::Device device) : device_(device), guard_(device.type()) {}

  void* allocate(int64_t bytes) override {
    c10::DeviceGuard guard(device_);
    try {
      return c10::GetAllocator(device_.type())->raw_allocate(static_cast<size_t>(bytes));
    } catch (const c10::OutOfMemoryError& error) {
      throw OutOfMemory(device_.str() + " has no " + format_bytes(bytes) +
                        " in one range: " + error.what_without_backtrace());
    }
  }
  void deallocate(void* address) noexcept override {
    c10::GetAllocator(device_.type())->raw_deallocate(address);
  }

  Stream make_stream() override { return pack(guard_.getNewStream(device_)); }
  void destroy_stream(Stream) noexcept override {}  // c10 streams come from a pool

  Event make_event(EventKind) override { return Event{reinterpret_cast<uint64_t>(new Handle)}; }
  void destroy_event(Event event) noexcept override {
    Handle* handle = handle_of(event);
    guard_.destroyEvent(handle->event, device_.index());
    delete handle;
  }
  void record(Event event, Stream stream) override {
    guard_.record(&handle_of(event)->event, unpack(stream), device_.index(),
                  c10::EventFlag::BACKEND_DEFAULT);
  }
  void wait(Stream stream, Event event) override {
    if (handle_of(event)->event != nullptr) {
      guard_.block(handle_of(event)->event, unpack(stream));
    }
  }
  bool is_done(Event event) override {
    void* handle = handle_of(event)->event;
    return handle == nullptr || guard_.queryEvent(handle);
  }
  bool is_idle(Stream stream) override { return guard_.queryStream(unpack(stream)); }
  double seconds_between(Event begin, Event end) override {
    void* first = handle_of(begin)->event;
    void* second = handle_of(end)->event;
    if (first == nullptr || second == nullptr || !guard_.queryEvent(first) ||
        !guard_.queryEvent(second)) {
      return NAN;
    }
    return guard_.elapsedTime(first, second, device_.index()) / 1e3;
  }

  void synchronize(Stream stream) override { guard_.synchronizeStream(unpack(stream)); }
  void synchronize(Event event) override {
    if (handle_of(event)->event != nullptr) {
      guard_.synchronizeEvent(handle_of(event)->event);
    }
  }
  void synchronize_all() override { guard_.synchronizeDevice(device_.index()); }

  void enqueue_copy(Stream stream, void* target, const void* host, int64_t bytes) override {
    c10::StreamGuard guard(unpack(stream));
    bytes_at(target, bytes, device_)
        .copy_(bytes_at(const_cast<void*>(host), bytes, c10::kCPU), /*non_blocking=*/true);
  }
  void enqueue_fill(Stream stream, void* target, uint8_t value, int64_t bytes) override {
    c10::StreamGuard guard(unpack(stream));
    bytes_at(target, bytes, device_).fill_(value);
  }
  bool pin(void*, int64_t) override { return true; }
  void unpin(void*) noexcept override {}

 private:
  struct Handle {
    void* event = nullptr;  // created by the first record
  };

  static Handle* handle_of(Event event) { return reinterpret_cast<Handle*>(event); }
  static Stream pack(const c10::Stream& stream) {
    return Stream{static_cast<uint64_t>(stream.id())};
  }
  c10::Stream unpack(Stream stream) const {
    return c10::Stream(c10::Stream::UNSAFE, device_, static_cast<c10::StreamId>(stream));
  }
  static at::Tensor bytes_at(void* address, int64_t bytes, c10::Device device) {
    const auto options = at::TensorOptions().dtype(at::kByte).device(device);
    return at::from_blob(address, {bytes}, /*deleter=*/[](void*) {}, options, device);
  }

  c10::Device device_;
  c10::impl::VirtualGuardImpl guard_;
};

}  // namespace

std::shared_ptr<Device> make_generic_device(const std::string& type, int index) {
  const c10::Device device(type + ":" + std::to_string(index));
  return std::make_shared<GenericDevice>(device);
}

}  // namespace blockswap
