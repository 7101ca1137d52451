#include "engine.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>

#include "error.h"

namespace blockswap {
namespace {

constexpr uint8_t kPoison = 0xFF;  // NaN as float, half and bfloat16

double seconds_since(std::chrono::steady_clock::time_point begin) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

}  // namespace

class Engine::Stopwatch {
 public:
  explicit Stopwatch(double& sum) : sum_(sum), begin_(Clock::now()) {}
  ~Stopwatch() { sum_ += seconds_since(begin_); }
  Stopwatch(const Stopwatch&) = delete;
  Stopwatch& operator=(const Stopwatch&) = delete;

 private:
  double& sum_;
  Clock::time_point begin_;
};

Engine::Engine(std::shared_ptr<Device> device, EngineOptions options)
    : device_(std::move(device)), options_(options) {
  for (int32_t i = 0; i < std::max(1, options_.num_copy_streams); ++i) {
    copy_streams_.push_back(device_->make_stream());
  }
  for (Device::Event* event : {&begin_, &end_, &measured_begin_, &measured_end_}) {
    *event = device_->make_event(Device::EventKind::kTimed);
  }
  step_end_ = device_->make_event(Device::EventKind::kOrders);
  residents_ready_ = device_->make_event(Device::EventKind::kOrders);
  compute_so_far_ = device_->make_event(Device::EventKind::kOrders);
}

Engine::~Engine() {
  try {
    stop();
  } catch (const std::exception&) {
    // The driver is gone or failing: there is nothing left to wait for.
  }
  fetch_thread_.reset();
  for (const Device::Event event : {begin_, end_, measured_begin_, measured_end_, step_end_,
                                    residents_ready_, compute_so_far_}) {
    device_->destroy_event(event);
  }
  for (const Device::Stream stream : copy_streams_) {
    device_->destroy_stream(stream);
  }
}

std::array<Device::Event*, 9> Engine::events_of(Track& track) {
  return {
      &track.ready,           &track.done,          &track.copies[0].begin, &track.copies[0].end,
      &track.copies[1].begin, &track.copies[1].end, &track.wait_begin,      &track.wait_end,
      &track.run_end};
}

void Engine::make_track(Track& track) {
  for (Device::Event* event : events_of(track)) {
    const bool orders = event == &track.ready || event == &track.done;
    *event = device_->make_event(orders ? Device::EventKind::kOrders : Device::EventKind::kTimed);
  }
}

void Engine::destroy_events() {
  for (size_t i = 0; i < tracks_.size(); ++i) {
    if (plan_.pieces[i].resident) {
      continue;
    }
    for (const Device::Event* event : events_of(tracks_[i])) {
      device_->destroy_event(*event);
    }
  }
  tracks_.clear();
}

void Engine::load(const Plan& plan, std::vector<HostImage> images, void* ring,
                  Device::Stream compute) {
  if (images.size() != plan.pieces.size()) {
    throw UseError("a plan of " + std::to_string(plan.pieces.size()) + " pieces got " +
                   std::to_string(images.size()) + " images");
  }
  stop();
  plan_ = plan;
  images_ = std::move(images);
  slots_.assign(plan_.pieces.size(), nullptr);
  tracks_.assign(plan_.pieces.size(), Track{});
  schedule_ = std::make_unique<Schedule>(plan_, /*keep_spent=*/!options_.check);
  counters_ = Counters{};
  for (size_t i = 0; i < plan_.pieces.size(); ++i) {
    if (!plan_.pieces[i].resident) {
      slots_[i] = static_cast<char*>(ring) + plan_.pieces[i].slot_offset;
      make_track(tracks_[i]);
    }
  }
  for (const Device::Stream stream : copy_streams_) {
    wait_for_compute(stream, compute);
  }
  schedule_->fetch_ahead(actions_);
  perform(compute);  // only fetches on copy streams
}

void Engine::wait_for_all() {
  if (fetch_thread_) {
    fetch_thread_->drain();
  }
  for (const Device::Stream stream : copy_streams_) {
    device_->synchronize(stream);
  }
  if (stepped_) {
    device_->synchronize(last_compute_);
  }
}

void Engine::start_over() {
  wait_for_all();
  schedule_ = std::make_unique<Schedule>(plan_, /*keep_spent=*/!options_.check);
  is_lost_ = false;
}

void Engine::stop() {
  wait_for_all();
  destroy_events();
  schedule_.reset();
  plan_ = Plan{};
  actions_.clear();
  outrun_.clear();
  stepped_ = false;
  measured_ = false;
  in_step_ = false;
  is_lost_ = false;
  residents_pending_ = false;
}

void Engine::record_time(Device::Event event, Device::Stream stream) {
  if (measures_) {
    const Stopwatch watch(sums_.measuring);
    device_->record(event, stream);
  }
}

// Until a fetch is issued: what orders streams by its events must come later.
void Engine::wait_issued(int64_t fetch) {
  if (fetch_thread_) {
    const Stopwatch watch(sums_.waiting);
    fetch_thread_->wait_issued(fetch);
  }
}

void Engine::perform(Device::Stream compute) {
  try {
    for (const Action& action : actions_) {
      perform(action, compute);
    }
  } catch (...) {
    actions_.clear();  // none is performed twice
    outrun_.clear();
    is_lost_ = true;
    throw;
  }
  actions_.clear();
  if (options_.check && schedule_) {
    schedule_->check_valid();
  }
}

void Engine::perform(const Action& action, Device::Stream compute) {
  Track& track = tracks_[static_cast<size_t>(action.piece)];
  switch (action.kind) {
    case Action::Kind::kRelease:
      if (options_.check) {
        device_->enqueue_fill(compute, slots_[static_cast<size_t>(action.piece)], kPoison,
                              plan_.pieces[static_cast<size_t>(action.piece)].bytes);
      }
      device_->record(track.done, compute);
      record_time(track.run_end, compute);
      break;
    case Action::Kind::kOutrun:
      outrun_.push_back(track.ready);
      break;
    case Action::Kind::kFetch:
      if (plan_.copy_on_compute) {
        enqueue_fetch(action, compute);
        wait_issued(track.fetch);  // before the stream's next work
      } else {
        enqueue_fetch(action, copy_streams_[next_copy_stream_]);
        next_copy_stream_ = (next_copy_stream_ + 1) % copy_streams_.size();
      }
      break;
    case Action::Kind::kWait:
      record_time(track.wait_begin, compute);
      if (measures_) {
        track.run_copy = track.newest_copy;
        track.run_is_timed = track.is_timed;
        track.ran = true;
      }
      wait_for(track.ready, track.fetch, compute);
      record_time(track.wait_end, compute);
      break;
  }
}

void Engine::begin_step(Device::Stream compute, bool continues) {
  if (in_step_) {
    throw UseError("a step begins while another one runs");
  }
  if (is_lost_) {
    start_over();
  }
  if (stepped_ && compute != last_compute_) {
    // The caller moved to another stream: what the old one still runs uses our slots.
    device_->wait(compute, step_end_);
  }
  if (residents_pending_) {
    const Stopwatch watch(sums_.own);
    wait_for(residents_ready_, residents_fetch_, compute);
    residents_pending_ = false;
  }
  last_compute_ = compute;
  in_step_ = true;
  if (!continues) {
    device_->record(begin_, compute);
    ++counters_.steps;
  }
  if (measures_ && !continues) {
    for (Track& track : tracks_) {
      track.ran = false;
    }
    measured_ = false;
    sums_ = HostSums{};
    host_begin_ = Clock::now();
    device_->record(measured_begin_, compute);
  }
  if (schedule_) {
    const Stopwatch watch(sums_.own);
    schedule_->fetch_ahead(actions_);
    perform(compute);
  }
}

void Engine::acquire(int32_t piece, Device::Stream compute) {
  if (!schedule_ || !in_step_) {
    throw UseError("piece " + std::to_string(piece) + " is acquired outside a step");
  }
  if (is_lost_) {
    throw DeviceError("piece " + std::to_string(piece) +
                      ": the device failed earlier in this step, and what the ring holds is not "
                      "known: run the model again");
  }
  const Stopwatch watch(sums_.own);
  schedule_->acquire(piece, actions_);
  if (measures_) {
    Track& track = tracks_[static_cast<size_t>(piece)];
    track.issued = seconds_since(host_begin_);
    track.waited = sums_.waiting;
  }
  perform(compute);
}

void Engine::release(int32_t piece, Device::Stream compute) {
  if (schedule_ && in_step_ && !is_lost_) {
    const Stopwatch watch(sums_.own);
    schedule_->release(piece, actions_);
    perform(compute);
  }
}

void Engine::end_step(Device::Stream compute) {
  if (!in_step_) {
    return;
  }
  in_step_ = false;
  last_compute_ = compute;
  stepped_ = true;  // also where what follows throws: stop() has to wait for this stream
  if (schedule_ && !is_lost_) {
    const Stopwatch watch(sums_.own);
    schedule_->end(actions_);
    perform(compute);
  }
  device_->record(end_, compute);
  device_->record(step_end_, compute);
  if (measures_) {
    device_->record(measured_end_, compute);
    host_seconds_ = seconds_since(host_begin_);
    measured_sums_ = sums_;
    measured_ = true;
  }
}

void Engine::invalidate(int32_t piece) {
  if (!schedule_ || is_lost_) {
    return;
  }
  if (in_step_) {
    throw UseError("piece " + std::to_string(piece) + " changed while the model runs");
  }
  if (plan_.pieces[static_cast<size_t>(piece)].resident) {
    throw UseError("piece " + std::to_string(piece) + " is resident: copy its leaves anew");
  }
  ++counters_.refetched;
  schedule_->invalidate(piece);
}

}  // namespace blockswap
