#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "copy_team.h"
#include "device/device.h"
#include "host_arena.h"

namespace blockswap {

// A little pinned memory through which pageable memory reaches the device. A driver that is given
// pageable memory makes the host wait for everything in the stream; here only the thread that
// copies waits, and only until a slot's earlier copy has left it.
// Owns the memory, an event per slot and the threads that fill slots. One thread uses it.
class BounceRing {
 public:
  static constexpr int64_t kNumSlots = 4;
  static constexpr int64_t kLeastBytes = kNumSlots << 16;  // smaller copies only cost launches

  // At most `bytes`, halved while the system refuses to pin as much; nullptr below kLeastBytes.
  static std::unique_ptr<BounceRing> make(std::shared_ptr<Device> device, const PinCalls& pin,
                                          int64_t bytes);
  // Waits until the last copies have left the slots.
  ~BounceRing();
  BounceRing(const BounceRing&) = delete;
  BounceRing& operator=(const BounceRing&) = delete;

  int64_t bytes() const { return kNumSlots * slot_bytes_; }
  // Enqueues all of the range; returns when `host` may change. `slowdown` as in Fetch.
  void copy(Device::Stream stream, void* target, const void* host, int64_t bytes, double slowdown);

 private:
  BounceRing(std::shared_ptr<Device> device, std::unique_ptr<HostArena> memory);

  std::shared_ptr<Device> device_;
  std::unique_ptr<HostArena> memory_;
  int64_t slot_bytes_;
  std::vector<Device::Event> left_;  // per slot: its bytes are on the device
  size_t next_ = 0;
  CopyTeam team_;
};

}  // namespace blockswap
