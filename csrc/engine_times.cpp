// What an Engine tells about time: read from events, off the hot path. engine.cpp records them.

#include <cmath>

#include "engine.h"

namespace blockswap {

StepTimes Engine::step_times() {
  StepTimes times;
  if (!measured_ || in_step_ || !schedule_) {
    return times;
  }
  device_->synchronize(last_compute_);
  times.step_seconds = device_->seconds_between(measured_begin_, measured_end_);
  for (size_t i = 0; i < tracks_.size(); ++i) {
    const Track& track = tracks_[i];
    if (plan_.pieces[i].resident || !track.ran) {
      continue;
    }
    const auto since_begin = [&](Device::Event event) {
      return device_->seconds_between(measured_begin_, event);
    };
    const CopyTimes& copy = track.copies[track.run_copy];
    times.pieces.push_back(
        {static_cast<int32_t>(i), track.run_is_timed ? since_begin(copy.begin) : NAN,
         track.run_is_timed ? since_begin(copy.end) : NAN, since_begin(track.wait_begin),
         since_begin(track.wait_end), since_begin(track.run_end)});
  }
  return times;
}

double Engine::step_seconds() {
  if (!stepped_ || in_step_) {
    return 0.0;
  }
  device_->synchronize(last_compute_);
  return device_->seconds_between(begin_, end_);
}

HostTimes Engine::host_times() const {
  HostTimes times;
  if (!measured_ || in_step_) {
    return times;
  }
  times.step_seconds = host_seconds_;
  times.waiting_seconds = measured_sums_.waiting;
  for (size_t i = 0; i < tracks_.size(); ++i) {
    if (!plan_.pieces[i].resident && tracks_[i].ran) {
      times.issued.emplace_back(static_cast<int32_t>(i), tracks_[i].issued);
      times.waited.push_back(tracks_[i].waited);
    }
  }
  if (!times.issued.empty()) {
    const auto num = static_cast<double>(times.issued.size());
    const HostSums& sums = measured_sums_;
    times.seconds_per_piece = (sums.own - sums.measuring - sums.waiting) / num;
    times.measuring_seconds_per_piece = sums.measuring / num;
  }
  return times;
}

double Engine::measure_link(HostImage image, void* target, int64_t bytes, int repeats,
                            Device::Stream compute) {
  wait_for_compute(copy_streams_[0], compute);
  Fetch fetch;
  fetch.stream = copy_streams_[0];
  fetch.target = target;
  fetch.image = image;
  fetch.bytes = bytes;
  const Device::Event begin = device_->make_event(Device::EventKind::kTimed);
  const Device::Event end = device_->make_event(Device::EventKind::kTimed);
  fetch.ready = begin;
  int64_t last = 0;
  // The first copies are slow on every driver, and an idle link needs some to wake up.
  for (int i = 0; i < 2 * repeats; ++i) {
    fetch.ready = i < repeats ? begin : end;
    last = enqueue(fetch);
  }
  wait_issued(last);
  device_->synchronize(fetch.stream);
  const double seconds = device_->seconds_between(begin, end);
  device_->destroy_event(begin);
  device_->destroy_event(end);
  return seconds > 0.0 ? static_cast<double>(bytes) * repeats / seconds : 0.0;
}

const Counters& Engine::counters() {
  if (schedule_) {
    counters_.mispredicted = schedule_->mispredicted();
  }
  return counters_;
}

}  // namespace blockswap
