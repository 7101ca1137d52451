#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <vector>

#include "device.h"

namespace blockswap {

// How far a stream's work is, in ticks. A mark is an event recorded in the stream; it ends the tick
// that runs. What was enqueued at tick t is over once done() >= t, so that one mark answers for all
// that was enqueued before it and nothing has to be recorded per use.
// Owns its events. The stream may be destroyed before it: the host then waits for the device where
// it would have made a mark, since nothing else tells when such a stream's work is over. The driver
// may say so once; a second call on such a stream has crashed one. Not thread-safe.
class StreamClock {
 public:
  StreamClock(std::shared_ptr<Device> device, Device::Stream stream);
  ~StreamClock();
  StreamClock(const StreamClock&) = delete;
  StreamClock& operator=(const StreamClock&) = delete;

  Device::Stream stream() const { return stream_; }
  // Somebody gives us work of this stream: it is alive, if need be as a new one of the same handle.
  void note_alive() { is_dead_ = false; }
  // The tick of what is enqueued now.
  int64_t now() const { return now_; }
  // As the last poll(), catch_up() or synchronize() found it.
  int64_t done() const { return done_; }

  // Ends this tick and returns it. Throws DeviceError; the tick then goes on.
  int64_t mark();
  // Memory was let go of at this tick. Marks by itself when it has become much: whoever asks later
  // then learns what is over, however much was enqueued behind it.
  void note_freed(int64_t bytes);
  // Asks the device how far it is, without waiting.
  void poll();
  // The same for work that was not marked yet.
  void catch_up();
  // `other` goes on when the last mark is reached; at once if it is known to be.
  void make_wait(Device::Stream other);
  // The host waits for all that this stream has enqueued.
  void synchronize();
  // The whole device has ended all that was enqueued; ends the tick and returns it.
  int64_t note_idle();

 private:
  struct Mark {
    int64_t tick;
    Device::Event event;
  };

  void reach(int64_t tick);

  std::shared_ptr<Device> device_;
  Device::Stream stream_;
  std::deque<Mark> marks_;  // not known to be done, in the order of the stream
  std::vector<Device::Event> spare_;
  int64_t now_ = 1;
  int64_t done_ = 0;
  int64_t unmarked_bytes_ = 0;  // freed since the last mark
  bool is_dead_ = false;        // the driver must not hear of it again
};

}  // namespace blockswap
