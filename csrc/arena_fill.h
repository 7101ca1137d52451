#pragma once

#include <condition_variable>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#include "host_arena.h"

namespace blockswap {

// One call of HostArena::fill: workers that copy parts, one thread that pins finished chunks, the
// caller that reports progress. Borrows arena, copies and calls; lives as long as run().
// Invariant: copies are started in order, and a started copy is always finished: so the finished
// ones come before the untouched ones.
class ArenaFill {
 public:
  ArenaFill(HostArena& arena, std::vector<HostArena::Copy>& copies, int num_threads,
            const PinCalls& pin, int64_t ahead_bytes);

  // Once. Returns true when all copies are finished; rethrows the first exception.
  bool run(const HostArena::Progress& progress);

 private:
  // What one worker copies at a time: [begin, begin + bytes) of a copy.
  struct Part {
    size_t copy = 0;
    int64_t begin = 0;
    int64_t bytes = 0;
  };

  void start_threads(std::vector<std::thread>& threads);
  void copy_parts();
  bool take(Part& part);
  Part take_locked();
  void copy_bytes(const Part& part) const;
  void finish(size_t copy);
  void pin_chunks();
  void stop_with(std::exception_ptr error);
  void end_thread(int& count);
  // Calls visit(index) for each chunk that the copy touches.
  template <class Visit>
  void for_each_chunk(const HostArena::Copy& copy, Visit visit) const;

  HostArena& arena_;
  std::vector<HostArena::Copy>& copies_;
  const PinCalls& pin_;
  int num_threads_ = 1;
  int64_t ahead_bytes_ = 0;

  std::mutex mutex_;                 // guards what follows, and Copy::finished
  std::condition_variable changed_;  // anything below
  size_t next_copy_ = 0;
  int64_t next_begin_ = 0;  // in next_copy_; not 0: it is started and has parts left
  int64_t open_bytes_ = 0;  // of copies started and not finished
  int64_t done_bytes_ = 0;
  std::vector<int64_t> left_bytes_;  // of each copy: not yet in place
  std::vector<int64_t> unfinished_;  // of each chunk: copies that touch it
  std::vector<size_t> ready_chunks_;
  size_t num_pinned_ = 0;  // of ready_chunks_
  int num_copying_ = 0;    // workers
  int num_pinning_ = 0;    // 1 while the pin thread runs
  bool stop_ = false;
  std::exception_ptr error_;
};

}  // namespace blockswap
