#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>

#include "bounce_ring.h"
#include "device/device.h"
#include "fetch.h"

namespace blockswap {

// Issues fetches in order on a thread of its own, so that neither filling the bounce ring nor the
// driver stops who asks for them. An event that a fetch records exists for others once the fetch is
// issued: whoever makes a stream wait for it calls wait_issued first.
// Hazard: an event that a fetch waits for must not be recorded anew before the fetch is issued.
class FetchThread {
 public:
  // `ring`: for pageable images; nullptr: there are none.
  FetchThread(std::shared_ptr<Device> device, std::unique_ptr<BounceRing> ring);
  // Issues what is queued first.
  ~FetchThread();
  FetchThread(const FetchThread&) = delete;
  FetchThread& operator=(const FetchThread&) = delete;

  int64_t ring_bytes() const { return ring_ ? ring_->bytes() : 0; }
  // The fetch's number, from 1 on.
  int64_t enqueue(Fetch fetch);
  // The host waits until the fetch of that number is issued, not until it is over. Rethrows what a
  // fetch threw; all behind it are then dropped until drain().
  void wait_issued(int64_t number);
  // Waits for all; forgets errors.
  void drain();

 private:
  void work();

  std::shared_ptr<Device> device_;
  std::unique_ptr<BounceRing> ring_;
  std::mutex mutex_;  // guards what follows
  std::condition_variable changed_;
  std::deque<Fetch> queue_;
  int64_t num_enqueued_ = 0;
  std::atomic<int64_t> num_issued_{0};  // written under the mutex
  std::exception_ptr error_;
  std::atomic<bool> failed_{false};
  bool stop_ = false;
  std::thread thread_;  // last: everything above exists before it starts
};

}  // namespace blockswap
