#pragma once

#include <array>
#include <chrono>
#include <cstdint>
#include <memory>
#include <vector>

#include "device/device.h"
#include "fetch_thread.h"
#include "plan.h"
#include "schedule.h"

namespace blockswap {

struct EngineOptions {
  int32_t num_copy_streams = 1;
  bool check = false;  // poison released slots, check invariants after each action
  // Emulates a slower link: each image is copied over itself until as many bytes have crossed the
  // link as a link of `throttle` would need the time for. 0 = off; else `link` must be measured.
  double throttle_bytes_per_second = 0.0;
  double link_bytes_per_second = 0.0;
};

// What happened since load(); bytes and copies without the throttle's padding.
struct Counters {
  int64_t steps = 0;
  int64_t copies = 0;  // streamed images copied
  int64_t copied_bytes = 0;
  int64_t mispredicted = 0;  // pieces that had to be fetched on demand
  int64_t refetched = 0;     // pieces fetched again because their host image changed
};

// When a streamed piece was copied and run, in seconds from the step's begin; NaN where unknown.
struct PieceTimes {
  int32_t piece = 0;
  double copy_begin = 0.0, copy_end = 0.0;  // may lie before 0: fetched in the step before
  double wait_begin = 0.0, wait_end = 0.0;  // the stall
  double run_end = 0.0;
};

struct StepTimes {
  double step_seconds = 0.0;
  std::vector<PieceTimes> pieces;
};

// When the host came to what it issues, in seconds from the step's begin on its own clock.
struct HostTimes {
  double step_seconds = 0.0;  // to issue everything
  // Per piece that ran: what acquire and release took, and what measuring cost on top.
  double seconds_per_piece = 0.0;
  double measuring_seconds_per_piece = 0.0;
  std::vector<std::pair<int32_t, double>> issued;  // piece, when
  // Of that it waited for the thread that issues fetches: in all, and before each of `issued`.
  double waiting_seconds = 0.0;
  std::vector<double> waited;
};

// Performs a schedule's actions on a device. Owns copy streams and events; borrows the ring, the
// residents' memory and the host images, which must outlive it (stop() before they go).
// One caller at a time. In steady state the host never waits for the device: everything is ordered
// by events. Each streamed piece is one copy.
// Streams: copies run on the engine's own streams, everything else on the caller's compute stream.
class Engine {
 public:
  Engine(std::shared_ptr<Device> device, EngineOptions options);
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  // Slows the link of all later fetches down; 0 = full speed.
  void throttle(double bytes_per_second, double link_bytes_per_second) {
    options_.throttle_bytes_per_second = bytes_per_second;
    options_.link_bytes_per_second = link_bytes_per_second;
  }

  // From here on all copies are issued on a thread, those of pageable images through its ring.
  // nullptr: at once by the caller, as in the beginning. pre: no plan is loaded.
  void bounce(std::unique_ptr<BounceRing> ring);
  // From here on copies are issued on a thread: a driver that was not called for a while takes some
  // 75 us for one (H200), to wake a thread costs the caller less. pre: no step runs.
  void issue_on_thread();
  bool issues_on_thread() const { return fetch_thread_ != nullptr; }
  int64_t bounce_bytes() const { return fetch_thread_ ? fetch_thread_->ring_bytes() : 0; }

  // Takes over a plan. images[i] = piece i on the host; those of residents are not looked at. Slots
  // lie at ring + slot_offset. Fetching ahead starts at once, behind what `compute` has enqueued.
  void load(const Plan& plan, std::vector<HostImage> images, void* ring, Device::Stream compute);
  // Waits for all copies; forgets the plan. Safe to call twice.
  void stop();

  // Measures steps from the next one on, or stops: five more events per piece and step. The copies
  // of a step's first pieces are known when the step before was measured, too.
  void measure(bool on) { measures_ = on; }
  // A step may run in parts, each with a begin and an end; all but the first one `continue` it.
  void begin_step(Device::Stream compute, bool continues = false);
  // Throws DeviceError; what the ring holds is then not known, and the next step fetches it anew.
  void acquire(int32_t piece, Device::Stream compute);
  void release(int32_t piece, Device::Stream compute);
  // Also after an exception: gives back what is live.
  void end_step(Device::Stream compute);

  // Brings bytes that stay to the device, behind what `compute` has enqueued and before the next
  // step uses them.
  void copy_fixed(void* target, HostImage image, int64_t bytes, Device::Stream compute);

  // The host image of a streamed piece changed between steps: it is copied again before the next
  // step uses it.
  void invalidate(int32_t piece);

  // Times of the last measured step that is complete. Blocks the host until it is done: not for the
  // hot path.
  StepTimes step_times();
  // Seconds of the last step, measured or not. Blocks until it is done.
  double step_seconds();
  // The host's share of the last measured step. Does not wait.
  HostTimes host_times() const;
  // Bytes per second of copying `bytes` of an image to `target`, alone on the link, behind what
  // `compute` has enqueued. Blocks until the last copy is done.
  double measure_link(HostImage image, void* target, int64_t bytes, int repeats,
                      Device::Stream compute);
  const Counters& counters();
  // The piece that was acquired and not yet released; -1: none.
  int32_t live() const { return schedule_ && !is_lost_ ? schedule_->live() : -1; }
  Device& device() { return *device_; }

 private:
  // Ordering and timing have events of their own: what a step measured stays readable while later
  // steps, which measure nothing, record only `ready` and `done`.
  struct CopyTimes {
    Device::Event begin, end;
  };
  struct Track {
    Device::Event ready, done;
    int64_t fetch = 0;    // its number on the thread that issues it
    CopyTimes copies[2];  // two, because the next step's fetch begins in this step
    int newest_copy = 0;
    bool is_timed = false;      // copies[newest_copy] times the bytes that lie in the slot now
    int run_copy = 0;           // the one that the last measured run used,
    bool run_is_timed = false;  // if it was timed
    Device::Event wait_begin, wait_end, run_end;
    bool ran = false;  // in the last measured step
    double issued = 0.0, waited = 0.0;
  };
  using Clock = std::chrono::steady_clock;
  // Adds what its scope takes on the host.
  class Stopwatch;

  void perform(Device::Stream compute);
  void perform(const Action& action, Device::Stream compute);
  void wait_for_all();
  void start_over();
  void record_time(Device::Event event, Device::Stream stream);
  void enqueue_fetch(const Action& action, Device::Stream stream);
  int64_t enqueue(const Fetch& fetch);
  void wait_for_compute(Device::Stream stream, Device::Stream compute);
  void wait_for(Device::Event event, int64_t fetch, Device::Stream compute);
  void wait_issued(int64_t fetch);
  static std::array<Device::Event*, 9> events_of(Track& track);
  void make_track(Track& track);
  void destroy_events();

  std::shared_ptr<Device> device_;
  EngineOptions options_;
  std::vector<Device::Stream> copy_streams_;
  size_t next_copy_stream_ = 0;
  Device::Event begin_, end_;                    // of each step
  Device::Event measured_begin_, measured_end_;  // of the last measured one
  Device::Event step_end_, residents_ready_;
  Device::Event compute_so_far_;
  bool residents_pending_ = false;
  int64_t residents_fetch_ = 0;  // number of the last one
  bool stepped_ = false;
  bool in_step_ = false;
  bool is_lost_ = false;  // an action failed: what the schedule believes did not happen
  bool measures_ = true;
  bool measured_ =
      false;  // measured_begin_, measured_end_ and the tracks hold a whole step's times
  Device::Stream last_compute_{};
  // On the host's clock, in the last measured step.
  Clock::time_point host_begin_{};
  double host_seconds_ = 0.0;
  struct HostSums {
    double own = 0.0, measuring = 0.0, waiting = 0.0;
  };
  HostSums sums_, measured_sums_;  // so far; of the last measured step

  Plan plan_;
  std::vector<HostImage> images_;
  std::vector<void*> slots_;   // nullptr: resident
  std::vector<Track> tracks_;  // per piece; events only for streamed ones
  std::unique_ptr<Schedule> schedule_;
  std::unique_ptr<FetchThread> fetch_thread_;  // only where images are pageable
  std::vector<Device::Event> outrun_;          // the next fetch's stream waits for them
  std::vector<Action> actions_;                // reused: nothing is allocated per step
  Counters counters_;
};

}  // namespace blockswap
