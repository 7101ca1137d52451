#include "stream_clock.h"

#include <utility>

#include "../error.h"
#include "../os.h"

namespace blockswap {
namespace {

// A mark is two calls of the driver; kernels that fill so much memory take at least 30 us.
constexpr int64_t kBytesPerMark = int64_t{128} << 20;
// When the host is so far ahead, it learns less often what is over.
constexpr size_t kMostMarks = 64;
// An idle stream reaches its mark within some 10 us; a look takes half of one.
constexpr int kIdleLooks = 64;

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
  try {
    if (!is_dead_) {
      device_->record(spare_.back(), stream_);
    }
  } catch (const DeadStream&) {
    is_dead_ = true;
  }
  if (is_dead_) {
    device_->synchronize_all();
    return note_idle();
  }
  marks_.push_back({now_, spare_.back()});
  spare_.pop_back();
  unmarked_bytes_ = 0;
  return now_++;
}

void StreamClock::note_freed(int64_t bytes) {
  const bool is_much = unmarked_bytes_ + bytes >= kBytesPerMark;
  if (is_much) {
    poll();
  }
  if (is_much && marks_.size() < kMostMarks) {
    mark();
  } else {
    unmarked_bytes_ += bytes;
  }
}

int64_t StreamClock::note_idle() {
  reach(now_);
  unmarked_bytes_ = 0;
  return now_++;
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
  // An idle stream is not believed, only looked at longer: it may wait for another one's event, and
  // nobody promises that a wait counts as work. A mark lies behind it in any case.
  int num_looks = 1;
  if (unmarked_bytes_ > 0) {
    try {
      num_looks = !is_dead_ && device_->is_idle(stream_) ? kIdleLooks : 1;
    } catch (const DeadStream&) {
      is_dead_ = true;
    }
    mark();
  }
  for (; num_looks > 0 && !marks_.empty(); --num_looks) {
    poll();
  }
}

void StreamClock::make_wait(Device::Stream other) {
  if (!marks_.empty()) {
    device_->wait(other, marks_.back().event);
  }
}

void StreamClock::synchronize() {
  const int64_t last = mark();
  if (done_ < last) {  // otherwise the stream is destroyed
    device_->synchronize(stream_);
    reach(last);
  }
}

}  // namespace blockswap
