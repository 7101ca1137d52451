#include "stream_clock.h"

#include <utility>

#include "../os.h"

namespace blockswap {
namespace {

// A mark costs the host 0.3 us, a kernel that fills so much memory about 20 us.
constexpr int64_t kBytesPerMark = int64_t{32} << 20;
// When the host is so far ahead, it learns less often what is over.
constexpr size_t kMostMarks = 64;

}  // namespace

StreamClock::StreamClock(std::shared_ptr<Device> device, Device::Stream stream)
    : device_(std::move(device)), stream_(stream) {}

StreamClock::~StreamClock() {
  if (os::process_is_exiting()) {
    return;  // the driver may be gone
  }
  for (const Mark& mark : marks_) {
    device_->destroy_event(mark.event);
  }
  for (const Device::Event event : spare_) {
    device_->destroy_event(event);
  }
}

int64_t StreamClock::mark() {
  if (spare_.empty()) {
    spare_.push_back(device_->make_event(Device::EventKind::kOrders));
  }
  device_->record(spare_.back(), stream_);
  marks_.push_back({now_, spare_.back()});
  spare_.pop_back();
  unmarked_bytes_ = 0;
  return now_++;
}

void StreamClock::note_freed(int64_t bytes) {
  if (unmarked_bytes_ + bytes >= kBytesPerMark && marks_.size() < kMostMarks) {
    mark();
    poll();
  } else {
    unmarked_bytes_ += bytes;
  }
}

// All marks up to that tick's are done.
void StreamClock::reach(int64_t tick) {
  while (!marks_.empty() && marks_.front().tick <= tick) {
    spare_.push_back(marks_.front().event);
    marks_.pop_front();
  }
  done_ = tick;
}

void StreamClock::poll() {
  while (!marks_.empty() && device_->is_done(marks_.front().event)) {
    reach(marks_.front().tick);
  }
}

void StreamClock::catch_up() {
  poll();
  // Marks first: a stream that only waits for an event may call itself idle.
  if (marks_.empty() && device_->is_idle(stream_)) {
    reach(now_++);
    unmarked_bytes_ = 0;
  } else if (unmarked_bytes_ > 0) {
    mark();
  }
}

void StreamClock::make_wait(Device::Stream other) {
  if (!marks_.empty()) {
    device_->wait(other, marks_.back().event);
  }
}

void StreamClock::synchronize() {
  device_->synchronize(stream_);
  reach(now_++);
  unmarked_bytes_ = 0;
}

}  // namespace blockswap
