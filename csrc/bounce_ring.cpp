#include "bounce_ring.h"

#include <algorithm>
#include <exception>
#include <utility>

#include "fetch.h"
#include "plan.h"

namespace blockswap {

std::unique_ptr<BounceRing> BounceRing::make(std::shared_ptr<Device> device, const PinCalls& pin,
                                             int64_t bytes) {
  for (; bytes >= kLeastBytes; bytes /= 2) {
    auto memory = std::make_unique<HostArena>(bytes);
    if (memory->pin(pin)) {
      return std::unique_ptr<BounceRing>(new BounceRing(std::move(device), std::move(memory)));
    }
  }
  return nullptr;
}

BounceRing::BounceRing(std::shared_ptr<Device> device, std::unique_ptr<HostArena> memory)
    : device_(std::move(device)),
      memory_(std::move(memory)),
      slot_bytes_(memory_->bytes() / kNumSlots / kAlignment * kAlignment) {
  for (int64_t i = 0; i < kNumSlots; ++i) {
    left_.push_back(device_->make_event(Device::EventKind::kOrders));
  }
}

BounceRing::~BounceRing() {
  for (const Device::Event event : left_) {
    try {
      device_->synchronize(event);
    } catch (const std::exception&) {
      // The driver is gone or failing: nothing reads the slot any more.
    }
    device_->destroy_event(event);
  }
}

void BounceRing::copy(Device::Stream stream, void* target, const void* host, int64_t bytes,
                      double slowdown) {
  for (int64_t begin = 0; begin < bytes; begin += slot_bytes_) {
    const int64_t part = std::min(slot_bytes_, bytes - begin);
    const Device::Event left = left_[next_];
    uint8_t* slot = memory_->data() + static_cast<int64_t>(next_) * slot_bytes_;
    next_ = (next_ + 1) % left_.size();
    device_->synchronize(left);
    team_.copy(slot, static_cast<const char*>(host) + begin, part);
    enqueue_copies(*device_, stream, static_cast<char*>(target) + begin, slot, part, slowdown);
    device_->record(left, stream);
  }
}

}  // namespace blockswap
