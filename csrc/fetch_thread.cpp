#include "fetch_thread.h"

#include <utility>

namespace blockswap {

FetchThread::FetchThread(std::shared_ptr<Device> device, std::unique_ptr<BounceRing> ring)
    : device_(std::move(device)), ring_(std::move(ring)), thread_([this] { work(); }) {}

FetchThread::~FetchThread() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  changed_.notify_all();
  thread_.join();
}

int64_t FetchThread::enqueue(Fetch fetch) {
  int64_t number = 0;
  {
    const std::lock_guard lock(mutex_);
    queue_.push_back(std::move(fetch));
    number = ++num_enqueued_;
  }
  changed_.notify_all();
  return number;
}

void FetchThread::wait_issued(int64_t number) {
  if (num_issued_.load(std::memory_order_acquire) < number) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return num_issued_.load() >= number; });
  }
  if (failed_.load(std::memory_order_acquire)) {
    const std::lock_guard lock(mutex_);
    std::rethrow_exception(error_);
  }
}

void FetchThread::drain() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [this] { return num_issued_.load() == num_enqueued_; });
  error_ = nullptr;
  failed_ = false;
}

void FetchThread::work() {
  for (;;) {
    Fetch fetch;
    {
      std::unique_lock lock(mutex_);
      changed_.wait(lock, [this] { return stop_ || !queue_.empty(); });
      if (queue_.empty()) {
        return;
      }
      fetch = std::move(queue_.front());
      queue_.pop_front();
    }
    std::exception_ptr error;
    if (!failed_) {
      try {
        issue(*device_, fetch, ring_.get(),
              [&](Device::Event event) { device_->record(event, fetch.stream); });
      } catch (...) {
        error = std::current_exception();
      }
    }
    {
      const std::lock_guard lock(mutex_);
      if (error) {
        error_ = error;
        failed_ = true;
      }
      ++num_issued_;
    }
    changed_.notify_all();
  }
}

}  // namespace blockswap
