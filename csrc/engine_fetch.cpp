// How an Engine brings bytes to the device: at once, or on a thread.

#include <utility>

#include "engine.h"

namespace blockswap {

void Engine::bounce(std::unique_ptr<BounceRing> ring) {
  stop();
  fetch_thread_.reset();
  if (ring != nullptr) {
    fetch_thread_ = std::make_unique<FetchThread>(device_, std::move(ring));
  }
}

void Engine::issue_on_thread() {
  if (!fetch_thread_) {  // what was issued so far has number 0
    fetch_thread_ = std::make_unique<FetchThread>(device_, nullptr);
  }
}

void Engine::copy_fixed(void* target, HostImage image, int64_t bytes, Device::Stream compute) {
  wait_for_compute(copy_streams_[0], compute);
  Fetch fetch;
  fetch.stream = copy_streams_[0];
  fetch.ready = residents_ready_;
  fetch.target = target;
  fetch.image = image;
  fetch.bytes = bytes;
  residents_fetch_ = enqueue(fetch);
  residents_pending_ = true;
}

// What is enqueued next on `stream` is behind all that `compute` has: others may have used the
// memory. By the caller itself, not by the thread: an event must not be recorded beside a wait.
void Engine::wait_for_compute(Device::Stream stream, Device::Stream compute) {
  device_->record(compute_so_far_, compute);
  device_->wait(stream, compute_so_far_);
}

int64_t Engine::enqueue(const Fetch& fetch) {
  if (fetch_thread_) {
    return fetch_thread_->enqueue(fetch);
  }
  issue(*device_, fetch, nullptr, [&](Device::Event event) { record_time(event, fetch.stream); });
  return 0;
}

// Compute goes on when the event is reached that a fetch records.
void Engine::wait_for(Device::Event event, int64_t fetch, Device::Stream compute) {
  wait_issued(fetch);
  device_->wait(compute, event);
}

void Engine::enqueue_fetch(const Action& action, Device::Stream stream) {
  const auto index = static_cast<size_t>(action.piece);
  Track& track = tracks_[index];
  Fetch fetch;
  fetch.stream = stream;
  if (action.overwritten >= 0) {
    // Wait on done, not ready: the earlier piece's kernels may still read this range.
    fetch.overwritten = tracks_[static_cast<size_t>(action.overwritten)].done;
  }
  fetch.outrun.swap(outrun_);
  track.is_timed = measures_;
  if (measures_) {
    track.newest_copy = 1 - track.newest_copy;
    fetch.begin = track.copies[track.newest_copy].begin;
    fetch.end = track.copies[track.newest_copy].end;
  }
  fetch.ready = track.ready;
  fetch.target = slots_[index];
  fetch.image = images_[index];
  fetch.bytes = plan_.pieces[index].bytes;
  if (options_.throttle_bytes_per_second > 0.0) {
    fetch.slowdown = options_.link_bytes_per_second / options_.throttle_bytes_per_second;
  }
  track.fetch = enqueue(fetch);
  ++counters_.copies;
  counters_.copied_bytes += fetch.bytes;
}

}  // namespace blockswap
