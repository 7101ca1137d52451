// A *part* is what one thread copies at a time, so that many threads share one large tensor. Parts
// of one copy meet at multiples of 2 MiB of addresses: two threads do not write one huge page.
// Pages are populated 2 MiB at a time, just before the copy writes them: then they are still in the
// cache, and the copy does not stop at faults. GB/s of 2 threads on a small virtual machine: 7.0;
// with whole parts populated at once 5.9; left to the copy's own faults 2.1.
#include "arena_fill.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <system_error>
#include <thread>
#include <utility>

#include "os.h"

namespace blockswap {
namespace {

constexpr int64_t kPartBytes = int64_t{16} << 20;
constexpr std::chrono::milliseconds kProgressInterval{50};

int64_t round_down(int64_t value, int64_t unit) { return value / unit * unit; }
int64_t round_up(int64_t value, int64_t unit) { return round_down(value + unit - 1, unit); }

}  // namespace

ArenaFill::ArenaFill(HostArena& arena, std::vector<HostArena::Copy>& copies, int num_threads,
                     const PinCalls& pin, int64_t ahead_bytes)
    : arena_(arena), copies_(copies), pin_(pin), unfinished_(arena.chunk_offsets().size()) {
  int64_t total = 0;
  int64_t num_parts = 0;
  left_bytes_.reserve(copies.size());
  for (const HostArena::Copy& copy : copies) {
    left_bytes_.push_back(copy.bytes);
    if (!copy.finished) {
      total += copy.bytes;
      num_parts += 1 + copy.bytes / kPartBytes;
      for_each_chunk(copy, [&](size_t chunk) { ++unfinished_[chunk]; });
    }
  }
  ready_chunks_.reserve(unfinished_.size());  // so that workers allocate nothing
  num_threads_ = static_cast<int>(std::min<int64_t>(num_threads, num_parts));
  // Enough that no thread waits: each copies one part, and one more lies finished beside it.
  ahead_bytes_ =
      ahead_bytes > 0 ? ahead_bytes : std::max(2 * kPartBytes * num_threads_, total / 100);
}

bool ArenaFill::run(const HostArena::Progress& progress) {
  std::vector<std::thread> threads;
  try {
    start_threads(threads);
  } catch (...) {
    stop_with(std::current_exception());
  }
  std::unique_lock<std::mutex> lock(mutex_);
  const auto ended = [this] { return num_copying_ == 0 && num_pinning_ == 0; };
  for (bool is_last = false; !is_last;) {
    is_last = changed_.wait_for(lock, kProgressInterval, ended);
    if (progress && !stop_) {
      const int64_t done_bytes = done_bytes_;
      lock.unlock();
      try {
        if (!progress(done_bytes)) {
          stop_with(nullptr);
        }
      } catch (...) {
        stop_with(std::current_exception());
      }
      lock.lock();
    }
  }
  lock.unlock();
  for (std::thread& thread : threads) {
    thread.join();
  }
  if (error_) {
    std::rethrow_exception(error_);
  }
  return std::all_of(copies_.begin(), copies_.end(),
                     [](const HostArena::Copy& copy) { return copy.finished; });
}

void ArenaFill::start_threads(std::vector<std::thread>& threads) {
  threads.reserve(static_cast<size_t>(num_threads_) + 1);  // emplace_back: only the thread can fail
  const auto start = [&](int& count, void (ArenaFill::*body)()) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      ++count;
    }
    try {
      threads.emplace_back([this, &count, body] {
        (this->*body)();
        end_thread(count);
      });
    } catch (...) {
      end_thread(count);
      throw;
    }
  };
  for (int i = 0; i < num_threads_; ++i) {
    start(num_copying_, &ArenaFill::copy_parts);
  }
  if (pin_.pin && num_threads_ > 0) {
    start(num_pinning_, &ArenaFill::pin_chunks);
  }
}

void ArenaFill::end_thread(int& count) {
  const std::lock_guard<std::mutex> lock(mutex_);
  --count;
  changed_.notify_all();
}

void ArenaFill::copy_parts() {
  for (Part part; take(part);) {
    copy_bytes(part);
    bool is_last = false;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      done_bytes_ += part.bytes;
      left_bytes_[part.copy] -= part.bytes;
      is_last = left_bytes_[part.copy] == 0;
    }
    if (is_last) {
      finish(part.copy);
    }
  }
}

// Waits until a part may be copied; false when none is left to this worker.
bool ArenaFill::take(Part& part) {
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    if (next_begin_ > 0) {  // never waits and never stops inside a copy
      part = take_locked();
      return true;
    }
    while (next_copy_ < copies_.size() && copies_[next_copy_].finished) {
      ++next_copy_;
    }
    if (stop_ || next_copy_ == copies_.size()) {
      return false;
    }
    const int64_t bytes = copies_[next_copy_].bytes;
    if (open_bytes_ == 0 || open_bytes_ + bytes <= ahead_bytes_) {
      open_bytes_ += bytes;
      part = take_locked();
      return true;
    }
    changed_.wait(lock);
  }
}

ArenaFill::Part ArenaFill::take_locked() {
  const HostArena::Copy& copy = copies_[next_copy_];
  int64_t end = copy.bytes;
  if (end - next_begin_ > kPartBytes) {
    end = round_down(copy.offset + next_begin_ + kPartBytes, os::kHugePageBytes) - copy.offset;
  }
  const Part part{next_copy_, next_begin_, end - next_begin_};
  next_begin_ = end;
  if (end == copy.bytes) {
    ++next_copy_;
    next_begin_ = 0;
  }
  return part;
}

void ArenaFill::copy_bytes(const Part& part) const {
  const HostArena::Copy& copy = copies_[part.copy];
  const auto* source = static_cast<const uint8_t*>(copy.source) + part.begin;
  int64_t begin = copy.offset + part.begin;
  const int64_t end = begin + part.bytes;
  while (begin < end) {
    const int64_t stop = std::min(end, round_down(begin, os::kHugePageBytes) + os::kHugePageBytes);
    const int64_t first_page = round_down(begin, os::page_bytes());
    // Where it is refused (before Linux 5.14), the copy's own faults take the pages.
    os::populate(arena_.data() + first_page, round_up(stop, os::page_bytes()) - first_page);
    std::memcpy(arena_.data() + begin, source, static_cast<size_t>(stop - begin));
    source += stop - begin;
    begin = stop;
  }
}

void ArenaFill::finish(size_t index) {
  HostArena::Copy& copy = copies_[index];
  try {
    const std::function<void()> safe = std::exchange(copy.safe, nullptr);
    if (safe) {
      safe();
    }
  } catch (...) {
    stop_with(std::current_exception());
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  copy.finished = true;
  open_bytes_ -= copy.bytes;
  for_each_chunk(copy, [this](size_t chunk) {
    if (--unfinished_[chunk] == 0) {
      ready_chunks_.push_back(chunk);
    }
  });
  changed_.notify_all();
}

void ArenaFill::pin_chunks() {
  for (;;) {
    int64_t begin = 0;
    {
      std::unique_lock<std::mutex> lock(mutex_);
      const auto has_ready = [this] { return num_pinned_ < ready_chunks_.size(); };
      changed_.wait(lock, [&] { return stop_ || has_ready() || num_copying_ == 0; });
      if (stop_ || !has_ready()) {
        return;
      }
      begin = arena_.chunk_offsets()[ready_chunks_[num_pinned_++]];
    }
    try {
      arena_.pin_range(pin_, begin, arena_.chunk_end(begin) - begin);
    } catch (...) {
      stop_with(std::current_exception());
    }
  }
}

void ArenaFill::stop_with(std::exception_ptr error) {
  const std::lock_guard<std::mutex> lock(mutex_);
  stop_ = true;
  if (!error_) {
    error_ = std::move(error);
  }
  changed_.notify_all();
}

template <class Visit>
void ArenaFill::for_each_chunk(const HostArena::Copy& copy, Visit visit) const {
  const std::vector<int64_t>& chunks = arena_.chunk_offsets();
  const auto after = std::upper_bound(chunks.begin(), chunks.end(), copy.offset);
  auto chunk = static_cast<size_t>(after - chunks.begin()) - 1;
  for (; chunk < chunks.size() && chunks[chunk] < copy.offset + copy.bytes; ++chunk) {
    visit(chunk);
  }
}

}  // namespace blockswap
