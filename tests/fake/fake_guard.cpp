// The fake accelerator as c10 sees it: what c10::Event, c10::StreamGuard, VirtualGuardImpl,
// torch.Stream, torch.Event and torch.accelerator call. isStreamCapturing keeps its default
// (false): nothing captures.

#include "fake_memory.h"
#include "fake_streams.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <cstring>
#include <utility>

namespace fake {
namespace {

using c10::Device;
using c10::DeviceIndex;
using c10::Stream;

// torch.Stream(device="fake") and c10::Device("fake") carry index -1: it means the current device.
Device with_index(Device device) {
  const int index = device.has_index() ? device.index() : current_device();
  return Device(c10::kPrivateUse1, static_cast<DeviceIndex>(index));
}

int index_of(Device device) { return with_index(device).index(); }

StreamQueue& queue_of(const Stream& stream) {
  return stream_queue(index_of(stream.device()), stream.id());
}

struct GuardImpl final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::kPrivateUse1; }
  DeviceIndex deviceCount() const noexcept override { return kNumDevices; }
  Device getDevice() const override {
    return Device(c10::kPrivateUse1, static_cast<DeviceIndex>(current_device()));
  }
  Device exchangeDevice(Device device) const override {
    const Device old = getDevice();
    setDevice(device);
    return old;
  }
  void setDevice(Device device) const override { set_current_device(index_of(device)); }
  void uncheckedSetDevice(Device device) const noexcept override {
    set_current_device(index_of(device));
  }

  Stream getStream(Device device) const override {
    return Stream(Stream::UNSAFE, with_index(device), current_stream(index_of(device)));
  }
  Stream getDefaultStream(Device device) const override {
    return Stream(Stream::UNSAFE, with_index(device), 0);
  }
  Stream getNewStream(Device device, int /*priority*/ = 0) const override {
    return Stream(Stream::UNSAFE, with_index(device), next_pool_stream(index_of(device)));
  }
  Stream getStreamFromGlobalPool(Device device, bool /*high_priority*/ = false) const override {
    return getNewStream(device);
  }
  Stream exchangeStream(Stream stream) const override {
    const Stream old = getStream(stream.device());
    set_current_stream(index_of(stream.device()), stream.id());
    return old;
  }
  bool queryStream(const Stream& stream) const override { return queue_of(stream).idle(); }
  void synchronizeStream(const Stream& stream) const override { queue_of(stream).synchronize(); }
  void synchronizeDevice(const DeviceIndex device) const override {
    fake::synchronize_device(device < 0 ? current_device() : device);
  }
  void recordDataPtrOnStream(const c10::DataPtr& /*data*/,
                             const Stream& /*stream*/) const override {
    // Every task holds the allocations that it uses.
  }

  void record(void** event, const Stream& stream, const DeviceIndex /*device*/,
              const c10::EventFlag /*flag*/) const override {
    if (*event == nullptr) {
      *event = new Event;
    }
    static_cast<Event*>(*event)->record(queue_of(stream));
  }
  void block(void* event, const Stream& stream) const override {
    if (event != nullptr) {
      static_cast<Event*>(event)->block(queue_of(stream));
    }
  }
  bool queryEvent(void* event) const override {
    return event == nullptr || static_cast<Event*>(event)->query();
  }
  void synchronizeEvent(void* event) const override {
    if (event != nullptr) {
      static_cast<Event*>(event)->synchronize();
    }
  }
  void destroyEvent(void* event, const DeviceIndex /*device*/) const noexcept override {
    delete static_cast<Event*>(event);  // waiting tasks share its marks, not the event
  }
  double elapsedTime(void* begin, void* end, const DeviceIndex /*device*/) const override {
    TORCH_CHECK(begin != nullptr && end != nullptr, "elapsed time needs two recorded events");
    return static_cast<Event*>(begin)->milliseconds_until(*static_cast<Event*>(end));
  }
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, GuardImpl);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex /*device*/) const override { return true; }
  DeviceIndex deviceCount() const override { return kNumDevices; }
  void setCurrentDevice(DeviceIndex device) const override { set_current_device(device); }
  DeviceIndex getCurrentDevice() const override {
    return static_cast<DeviceIndex>(current_device());
  }
  DeviceIndex exchangeDevice(DeviceIndex device) const override {
    const DeviceIndex old = getCurrentDevice();
    set_current_device(device);
    return old;
  }
  DeviceIndex maybeExchangeDevice(DeviceIndex device) const override {
    return device < 0 ? getCurrentDevice() : exchangeDevice(device);
  }
  bool isPinnedPtr(const void* address) const override { return is_pinned(address); }
  at::Allocator* getPinnedMemoryAllocator() const override { return pinned_allocator(); }
  Device getDeviceFromPtr(void* address) const override {
    const int device = device_of(address);
    TORCH_CHECK(device >= 0, "address ", address,
                " is not in the fake device's memory: at::from_blob on ",
                "memory of your own needs target_device");
    return Device(c10::kPrivateUse1, static_cast<DeviceIndex>(device));
  }
  // Random operators run on the CPU's generator, so the same seed gives the same values as there.
  const at::Generator& getDefaultGenerator(DeviceIndex /*device*/) const override {
    return at::detail::getDefaultCPUGenerator();
  }
  at::Generator getNewGenerator(DeviceIndex /*device*/) const override {
    return at::detail::createCPUGenerator();
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    const Device device = storage.device();
    fake::synchronize_device(device.index());  // tasks keep the old address
    const GuardImpl guard;
    const Device old_device = guard.exchangeDevice(device);
    c10::DataPtr fresh = device_allocator()->allocate(bytes);
    guard.setDevice(old_device);
    if (const size_t kept = std::min(bytes, storage.nbytes())) {
      std::memcpy(fresh.get(), storage.data(), kept);
    }
    storage.set_data_ptr_noswap(std::move(fresh));
    storage.unsafeGetStorageImpl()->set_nbytes(bytes);
  }
};

const bool hooks_registered = [] {
  static Hooks hooks;
  at::RegisterPrivateUse1HooksInterface(&hooks);
  return true;
}();

}  // namespace
}  // namespace fake
