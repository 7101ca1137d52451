#pragma once

#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace blockswap {

// Threads that share one memcpy: a single core reads host memory slower than a link sends it.
// One caller at a time; it copies as well.
class CopyTeam {
 public:
  // As many as that, the caller among them; 0: a quarter of the cores, four at most.
  explicit CopyTeam(int num_threads = 0);
  ~CopyTeam();
  CopyTeam(const CopyTeam&) = delete;
  CopyTeam& operator=(const CopyTeam&) = delete;

  // Returns when all bytes are in place.
  void copy(void* target, const void* source, int64_t bytes);

 private:
  void work(int64_t member);
  void copy_stripe(int64_t member) const;

  std::mutex mutex_;  // guards what follows
  std::condition_variable changed_;
  char* target_ = nullptr;
  const char* source_ = nullptr;
  int64_t bytes_ = 0;
  int64_t round_ = 0;  // a new one for each copy
  int64_t num_left_ = 0;
  bool stop_ = false;
  std::vector<std::thread> members_;  // last: everything above exists before they start
};

}  // namespace blockswap
