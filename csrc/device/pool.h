#pragma once

#include <cstdint>
#include <memory>

#include "device.h"

namespace blockswap {

// The device memory of one session: small parameters, residents and ring. Owns one range outside
// PyTorch's caching allocator, behind the interface that a growing pool keeps.
// Invariant: address() is valid for bytes() until the next reserve() or release().
class Pool {
 public:
  explicit Pool(std::shared_ptr<Device> device) : device_(std::move(device)) {}
  ~Pool() { release(); }
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  // Replaces the range. Nothing may use the old one any more. Throws DeviceError with the numbers;
  // the pool is then empty.
  void* reserve(int64_t bytes) {
    release();
    if (bytes > 0) {
      address_ = device_->allocate(bytes);
      bytes_ = bytes;
    }
    return address_;
  }
  void release() {
    if (address_ != nullptr) {
      device_->deallocate(address_);
      address_ = nullptr;
      bytes_ = 0;
    }
  }
  void* address() const { return address_; }
  int64_t bytes() const { return bytes_; }

 private:
  std::shared_ptr<Device> device_;
  void* address_ = nullptr;
  int64_t bytes_ = 0;
};

}  // namespace blockswap
