#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "bounce_ring.h"
#include "device/device.h"

namespace blockswap {

// Where an image lies. What is not pinned cannot be copied behind the host's back.
struct HostImage {
  const void* address = nullptr;
  bool is_pinned = true;
};

// One image on its way to the device, with all that orders and times it. Borrows everything.
struct Fetch {
  Device::Stream stream{};
  std::optional<Device::Event> overwritten;  // the last use of what lies in the target
  std::vector<Device::Event> outrun;         // copies into the target that nobody waited for
  std::optional<Device::Event> begin, end;   // time the copy
  Device::Event ready{};
  void* target = nullptr;
  HostImage image;  // not pinned: by way of the bounce ring, if there is one
  int64_t bytes = 0;
  double slowdown = 1.0;  // how many times as long the copy is to take
};

// Copies bytes over themselves until the link was busy for `slowdown` times as long.
inline void enqueue_copies(Device& device, Device::Stream stream, void* target, const void* host,
                           int64_t bytes, double slowdown) {
  auto padding = static_cast<int64_t>(static_cast<double>(bytes) * (slowdown - 1.0));
  for (; padding > 0; padding -= bytes) {
    device.enqueue_copy(stream, target, host, std::min(padding, bytes));
  }
  device.enqueue_copy(stream, target, host, bytes);
}

// Enqueues a fetch; `time(event)` records an event that only measures.
template <class Time>
void issue(Device& device, const Fetch& fetch, BounceRing* ring, Time time) {
  if (fetch.overwritten) {
    device.wait(fetch.stream, *fetch.overwritten);
  }
  for (const Device::Event copied : fetch.outrun) {
    device.wait(fetch.stream, copied);
  }
  if (fetch.begin) {
    time(*fetch.begin);
  }
  const void* host = fetch.image.address;
  if (fetch.image.is_pinned || ring == nullptr) {
    enqueue_copies(device, fetch.stream, fetch.target, host, fetch.bytes, fetch.slowdown);
  } else {
    ring->copy(fetch.stream, fetch.target, host, fetch.bytes, fetch.slowdown);
  }
  device.record(fetch.ready, fetch.stream);
  if (fetch.end) {
    time(*fetch.end);
  }
}

}  // namespace blockswap
