// Streams and events of the fake accelerator.
//
// A stream is a worker thread that runs closures in order; the caller never waits unless it asks
// to. So a missing wait between two streams is a real data race here, as on a GPU, and delays
// (below) make it lose every time. No torch headers: operators, memory and the c10 guard are built
// on top.
//
// Rule for tasks: they run on a worker, so they must never need the GIL. What a task owns is
// destroyed on a host thread later (see StreamQueue::enqueue), because it may include Python
// objects.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <vector>

namespace fake {

constexpr int kNumDevices = 2;
constexpr int kNumStreams = 8;  // per device; stream 0 is the default stream

using Task = std::function<void()>;

// Injected slowness. Slept on the workers, so that the host runs ahead as it does of a GPU. Body
// and copy delays are those in force when the operator is called.
struct Delays {
  std::atomic<double> body_seconds{0};           // before each asynchronous operator
  std::atomic<double> copy_seconds_per_byte{0};  // a link's bandwidth
  std::atomic<double> copy_seconds_per_copy{0};  // and its latency
  std::atomic<double> random_max_seconds{0};     // before every task, uniform in [0, max]
  std::atomic<uint64_t> random_seed{0};
  std::atomic<uint64_t> random_generation{0};  // tells workers to seed again
};
Delays& delays();
void sleep_seconds(double seconds);

// Gives the GIL back while the calling thread blocks, if that thread holds it.
class WithoutGil {
 public:
  WithoutGil();
  ~WithoutGil();
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;

 private:
  void* state_;
};

// Owns one worker thread, started by the first task. Any thread may call any method.
// Invariant: done_ <= issued_, tasks start in the order of enqueue, one at a time.
class StreamQueue {
 public:
  // Returns at once. The finished task is kept, and destroyed by the next host call to this queue.
  void enqueue(Task task);
  // Blocks until all tasks enqueued before are done; throws what the first failed one threw.
  void synchronize();
  bool idle();
  // Throws what a task threw, once.
  void rethrow_error();

 private:
  void run();
  void random_sleep(uint64_t& generation, std::mt19937_64& random);
  void destroy_finished();

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Task> waiting_;
  std::vector<Task> finished_;
  std::exception_ptr error_;
  uint64_t issued_ = 0;
  uint64_t done_ = 0;
  bool started_ = false;
};

StreamQueue& stream_queue(int device, int64_t stream);
void synchronize_device(int device);

// What is current on the calling thread.
int current_device();
void set_current_device(int device);
int64_t current_stream(int device);
void set_current_stream(int device, int64_t stream);
StreamQueue& current_queue(int device);
// Round robin over the streams that are not the default one.
int64_t next_pool_stream(int device);

// One record of an event: a point in one stream's order of tasks.
class Mark {
 public:
  explicit Mark(StreamQueue& queue) : queue_(queue) {}
  void complete();
  void wait();  // may be called on a worker: needs no GIL and throws nothing
  bool completed();
  std::chrono::steady_clock::time_point time();
  StreamQueue& queue() { return queue_; }

 private:
  StreamQueue& queue_;
  std::mutex mutex_;
  std::condition_variable changed_;
  bool completed_ = false;
  std::chrono::steady_clock::time_point time_;
};

// An event is its latest mark. Each record makes a new one, so a stream that waits for an earlier
// record is neither released by nor delayed to a later one, as on CUDA. Never recorded counts as
// done.
class Event {
 public:
  void record(StreamQueue& queue);
  void block(StreamQueue& queue);
  bool query();
  void synchronize();
  double milliseconds_until(Event& end);

 private:
  std::shared_ptr<Mark> latest();

  std::mutex mutex_;
  std::shared_ptr<Mark> latest_;
};

}  // namespace fake
