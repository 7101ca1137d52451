#pragma once

// A device of its own: streams are threads, copies and kernels run later than they are enqueued,
// and each kernel checks that it sees the image of its own piece.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <iterator>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

#include "../../csrc/device/device.h"
#include "../../csrc/error.h"

namespace blockswap::test {

class Worker {
 public:
  Worker() : thread_([this] { run(); }) {}
  ~Worker() {
    push({});
    thread_.join();
  }
  void push(std::function<void()> task) {
    std::lock_guard lock(mutex_);
    tasks_.push_back(std::move(task));
    changed_.notify_all();
  }
  void drain() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return tasks_.empty() && !busy_; });
  }
  bool is_idle() {
    std::lock_guard lock(mutex_);
    return tasks_.empty() && !busy_;
  }

 private:
  void run() {
    for (;;) {
      std::function<void()> task;
      {
        std::unique_lock lock(mutex_);
        changed_.wait(lock, [&] { return !tasks_.empty(); });
        task = std::move(tasks_.front());
        tasks_.pop_front();
        busy_ = true;
      }
      if (!task) {
        return;
      }
      task();
      {
        std::lock_guard lock(mutex_);
        busy_ = false;
      }
      changed_.notify_all();
    }
  }
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> tasks_;
  bool busy_ = false;
  std::thread thread_;  // last: everything above exists before it starts
};

struct Mark {
  std::mutex mutex;
  std::condition_variable changed;
  int64_t recorded = 0, done = 0;
};

class ThreadDevice final : public Device {
 public:
  void* allocate(int64_t bytes) override { return std::malloc(static_cast<size_t>(bytes)); }
  void deallocate(void* address) noexcept override { std::free(address); }
  Stream make_stream() override {
    workers_.push_back(std::make_unique<Worker>());
    return Stream{workers_.size() - 1};
  }
  void destroy_stream(Stream) noexcept override {}
  Event make_event(EventKind) override { return Event{reinterpret_cast<uint64_t>(new Mark)}; }
  void destroy_event(Event event) noexcept override { delete mark(event); }
  void record(Event event, Stream stream) override {
    Mark* m = mark(event);
    int64_t version = 0;
    {
      std::lock_guard lock(m->mutex);
      version = ++m->recorded;
    }
    worker(stream).push([m, version] {
      std::lock_guard lock(m->mutex);
      m->done = std::max(m->done, version);
      m->changed.notify_all();
    });
  }
  void wait(Stream stream, Event event) override {
    Mark* m = mark(event);
    int64_t version = 0;
    {
      std::lock_guard lock(m->mutex);
      version = m->recorded;
    }
    worker(stream).push([m, version] {
      std::unique_lock lock(m->mutex);
      m->changed.wait(lock, [&] { return m->done >= version; });
    });
  }
  bool is_done(Event event) override {
    Mark* m = mark(event);
    std::lock_guard lock(m->mutex);
    return m->done >= m->recorded;
  }
  bool is_idle(Stream stream) override { return worker(stream).is_idle(); }
  double seconds_between(Event, Event) override { return 1e-3; }
  void synchronize(Stream stream) override { worker(stream).drain(); }
  void synchronize(Event event) override {
    Mark* m = mark(event);
    std::unique_lock lock(m->mutex);
    m->changed.wait(lock, [&] { return m->done >= m->recorded; });
  }
  void synchronize_all() override {
    for (const auto& worker : workers_) worker->drain();
  }
  void enqueue_copy(Stream stream, void* target, const void* host, int64_t bytes) override {
    if (--copies_until_failure == 0) {
      throw DeviceError("the copy failed");
    }
    unpinned_copies += !is_pinned(host);
    const int delay = jitter() + (bytes >= slow_copy_bytes ? 2000 : 0);
    worker(stream).push([=] {
      std::this_thread::sleep_for(std::chrono::microseconds(delay));
      std::memcpy(target, host, static_cast<size_t>(bytes));
    });
  }
  void enqueue_fill(Stream stream, void* target, uint8_t value, int64_t bytes) override {
    worker(stream).push([=] { std::memset(target, value, static_cast<size_t>(bytes)); });
  }
  bool pin(void* host, int64_t bytes) override {
    if (bytes > most_pinned_bytes) {
      return false;
    }
    std::lock_guard lock(mutex_);
    pinned_[reinterpret_cast<uint64_t>(host)] = bytes;
    return true;
  }
  void unpin(void* host) noexcept override {
    std::lock_guard lock(mutex_);
    pinned_.erase(reinterpret_cast<uint64_t>(host));
  }

  // A kernel: reads every byte of the range, slowly, and counts those that are not `expected`.
  void enqueue_kernel(Stream stream, const uint8_t* range, int64_t bytes, uint8_t expected,
                      std::atomic<int>& wrong) {
    const int delay = jitter();
    worker(stream).push([=, &wrong] {
      for (int pass = 0; pass < 2; ++pass) {
        for (int64_t i = 0; i < bytes; ++i) {
          wrong += range[i] != expected;
        }
        std::this_thread::sleep_for(std::chrono::microseconds(delay));
      }
    });
  }
  // The stream stands still until then.
  void hold(Stream stream, const std::atomic<bool>& goes_on) {
    worker(stream).push([&goes_on] {
      while (!goes_on) {
        std::this_thread::yield();
      }
    });
  }
  std::atomic<int64_t> slow_copy_bytes{INT64_MAX};  // copies of this size or larger take 2 ms
  int64_t most_pinned_bytes = INT64_MAX;            // in one registration
  std::atomic<int64_t> copies_until_failure{0};
  std::atomic<int64_t> unpinned_copies{0};  // copies from memory that was never registered

  int jitter() {
    std::lock_guard lock(mutex_);
    return static_cast<int>(random_() % 60);
  }

 private:
  static Mark* mark(Event event) { return reinterpret_cast<Mark*>(event); }
  Worker& worker(Stream stream) { return *workers_[static_cast<size_t>(stream)]; }
  bool is_pinned(const void* host) {
    const auto address = reinterpret_cast<uint64_t>(host);
    std::lock_guard lock(mutex_);
    const auto after = pinned_.upper_bound(address);
    return after != pinned_.begin() &&
           address < std::prev(after)->first + static_cast<uint64_t>(std::prev(after)->second);
  }
  std::mutex mutex_;  // guards what follows, but not workers_
  std::map<uint64_t, int64_t> pinned_;
  std::vector<std::unique_ptr<Worker>> workers_;
  std::mt19937 random_{1};
};

}  // namespace blockswap::test
