#include "pinner.h"

namespace blockswap {

PinCalls Pinner::calls() {
  const std::shared_ptr<Pinner> self = shared_from_this();
  return {[self](void* address, int64_t bytes) { return self->pin(address, bytes); },
          [self](void* address) { self->unpin(address); }};
}

bool Pinner::pin(void* address, int64_t bytes) {
  {
    const std::lock_guard lock(mutex_);
    if (bytes > limit_bytes_ - pinned_bytes_) {
      return false;
    }
    pinned_bytes_ += bytes;  // before the driver is asked, which takes long
  }
  bool pinned = false;
  try {
    pinned = device_->pin(address, bytes);
  } catch (...) {
    const std::lock_guard lock(mutex_);
    pinned_bytes_ -= bytes;
    throw;
  }
  const std::lock_guard lock(mutex_);
  if (pinned) {
    ranges_[address] = bytes;
  } else {
    pinned_bytes_ -= bytes;
    was_refused_ = true;
  }
  return pinned;
}

void Pinner::unpin(void* address) {
  device_->unpin(address);
  const std::lock_guard lock(mutex_);
  const auto range = ranges_.find(address);
  pinned_bytes_ -= range->second;
  ranges_.erase(range);
}

int64_t Pinner::pinned_bytes() const {
  const std::lock_guard lock(mutex_);
  return pinned_bytes_;
}

bool Pinner::was_refused() const {
  const std::lock_guard lock(mutex_);
  return was_refused_;
}

}  // namespace blockswap
