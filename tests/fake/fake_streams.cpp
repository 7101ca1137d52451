#include "fake_streams.h"

#include <Python.h>

#include <stdexcept>
#include <string>
#include <thread>
#include <utility>

namespace fake {

Delays& delays() {
  static Delays instance;
  return instance;
}

void sleep_seconds(double seconds) {
  if (seconds > 0) {
    std::this_thread::sleep_for(std::chrono::duration<double>(seconds));
  }
}

// A worker has no Python thread state, so PyGILState_Check() is false there.
WithoutGil::WithoutGil()
    : state_(Py_IsInitialized() && PyGILState_Check() ? PyEval_SaveThread() : nullptr) {}

WithoutGil::~WithoutGil() {
  if (state_ != nullptr) {
    PyEval_RestoreThread(static_cast<PyThreadState*>(state_));
  }
}

// ------------------------------------------------------------------------------------------------
// StreamQueue

void StreamQueue::enqueue(Task task) {
  destroy_finished();
  {
    std::lock_guard lock(mutex_);
    waiting_.push_back(std::move(task));
    ++issued_;
    if (!started_) {
      started_ = true;
      // Detached on purpose: a worker may wait for an event that is never recorded, and the process
      // must be able to end. The queues are never destroyed.
      std::thread([this] { run(); }).detach();
    }
  }
  changed_.notify_all();
}

void StreamQueue::run() {
  uint64_t generation = 0;
  std::mt19937_64 random;
  for (;;) {
    Task task;
    {
      std::unique_lock lock(mutex_);
      changed_.wait(lock, [&] { return !waiting_.empty(); });
      task = std::move(waiting_.front());
      waiting_.pop_front();
    }
    random_sleep(generation, random);
    std::exception_ptr error;
    try {
      task();
    } catch (...) {
      // Later tasks still run: an event that never completes would hang the test instead of failing
      // it.
      error = std::current_exception();
    }
    {
      std::lock_guard lock(mutex_);
      finished_.push_back(std::move(task));
      if (error && !error_) {
        error_ = error;
      }
      ++done_;
    }
    changed_.notify_all();
  }
}

void StreamQueue::random_sleep(uint64_t& generation, std::mt19937_64& random) {
  const double max_seconds = delays().random_max_seconds;
  if (max_seconds <= 0) {
    return;
  }
  const uint64_t wanted = delays().random_generation;
  if (generation != wanted) {
    generation = wanted;
    const auto stream = static_cast<uint64_t>(this - &stream_queue(0, 0));
    random.seed(delays().random_seed * 1000 + stream);
  }
  sleep_seconds(std::uniform_real_distribution<double>(0, max_seconds)(random));
}

void StreamQueue::destroy_finished() {
  std::vector<Task> finished;
  {
    std::lock_guard lock(mutex_);
    finished.swap(finished_);
  }
}

void StreamQueue::synchronize() {
  {
    WithoutGil without_gil;
    std::unique_lock lock(mutex_);
    const uint64_t target = issued_;
    changed_.wait(lock, [&] { return done_ >= target; });
  }
  destroy_finished();
  rethrow_error();
}

bool StreamQueue::idle() {
  std::lock_guard lock(mutex_);
  return done_ == issued_;
}

void StreamQueue::rethrow_error() {
  std::exception_ptr error;
  {
    std::lock_guard lock(mutex_);
    error = std::exchange(error_, nullptr);
  }
  if (error) {
    std::rethrow_exception(error);
  }
}

StreamQueue& stream_queue(int device, int64_t stream) {
  static auto* queues = new StreamQueue[kNumDevices * kNumStreams];  // outlives its workers: leaked
  if (device < 0 || device >= kNumDevices || stream < 0 || stream >= kNumStreams) {
    throw std::out_of_range("fake device has no stream " + std::to_string(stream) + " on device " +
                            std::to_string(device) + ": it has " + std::to_string(kNumDevices) +
                            " devices with " + std::to_string(kNumStreams) + " streams each");
  }
  return queues[device * kNumStreams + stream];
}

void synchronize_device(int device) {
  for (int64_t stream = 0; stream < kNumStreams; ++stream) {
    stream_queue(device, stream).synchronize();
  }
}

// ------------------------------------------------------------------------------------------------
// Current device and stream, per thread as on CUDA

namespace {
thread_local int this_device = 0;
thread_local int64_t this_stream[kNumDevices] = {};
}  // namespace

int current_device() { return this_device; }

void set_current_device(int device) {
  stream_queue(device, 0);  // refuses a device that does not exist
  this_device = device;
}

int64_t current_stream(int device) { return this_stream[device]; }

void set_current_stream(int device, int64_t stream) {
  stream_queue(device, stream);
  this_stream[device] = stream;
}

StreamQueue& current_queue(int device) { return stream_queue(device, current_stream(device)); }

int64_t next_pool_stream(int device) {
  static std::atomic<int64_t> next[kNumDevices] = {};
  return 1 + next[device]++ % (kNumStreams - 1);
}

// ------------------------------------------------------------------------------------------------
// Events

void Mark::complete() {
  {
    std::lock_guard lock(mutex_);
    time_ = std::chrono::steady_clock::now();
    completed_ = true;
  }
  changed_.notify_all();
}

void Mark::wait() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return completed_; });
}

bool Mark::completed() {
  std::lock_guard lock(mutex_);
  return completed_;
}

std::chrono::steady_clock::time_point Mark::time() {
  std::lock_guard lock(mutex_);
  return time_;
}

std::shared_ptr<Mark> Event::latest() {
  std::lock_guard lock(mutex_);
  return latest_;
}

void Event::record(StreamQueue& queue) {
  auto mark = std::make_shared<Mark>(queue);
  {
    std::lock_guard lock(mutex_);
    latest_ = mark;
  }
  queue.enqueue([mark] { mark->complete(); });
}

void Event::block(StreamQueue& queue) {
  if (auto mark = latest()) {
    queue.enqueue([mark] { mark->wait(); });
  }
}

bool Event::query() {
  auto mark = latest();
  return !mark || mark->completed();
}

void Event::synchronize() {
  if (auto mark = latest()) {
    {
      WithoutGil without_gil;
      mark->wait();
    }
    mark->queue().rethrow_error();
  }
}

double Event::milliseconds_until(Event& end) {
  auto from = latest();
  auto to = end.latest();
  if (!from || !to || !from->completed() || !to->completed()) {
    throw std::runtime_error("elapsed time needs two events that were recorded and are done");
  }
  return std::chrono::duration<double, std::milli>(to->time() - from->time()).count();
}

}  // namespace fake
