#include "copy_team.h"

#include <algorithm>
#include <cstring>

#include "os.h"

namespace blockswap {
namespace {

constexpr int kMaxThreads = 4;
constexpr int64_t kWorthSharing = int64_t{1} << 20;  // waking a thread takes as long as 100 kB

}  // namespace

CopyTeam::CopyTeam(int num_threads) {
  if (num_threads <= 0) {
    num_threads = std::clamp(os::num_usable_cores() / 4, 1, kMaxThreads);
  }
  for (int64_t member = 1; member < num_threads; ++member) {
    members_.emplace_back([this, member] { work(member); });
  }
}

CopyTeam::~CopyTeam() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  changed_.notify_all();
  for (std::thread& member : members_) {
    member.join();
  }
}

void CopyTeam::copy(void* target, const void* source, int64_t bytes) {
  if (members_.empty() || bytes < kWorthSharing) {
    std::memcpy(target, source, static_cast<size_t>(bytes));
    return;
  }
  {
    const std::lock_guard lock(mutex_);
    target_ = static_cast<char*>(target);
    source_ = static_cast<const char*>(source);
    bytes_ = bytes;
    num_left_ = static_cast<int64_t>(members_.size());
    ++round_;
  }
  changed_.notify_all();
  copy_stripe(0);
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [this] { return num_left_ == 0; });
}

void CopyTeam::work(int64_t member) {
  for (int64_t done = 0;;) {
    {
      std::unique_lock lock(mutex_);
      changed_.wait(lock, [&] { return stop_ || round_ != done; });
      if (stop_) {
        return;
      }
      done = round_;
    }
    copy_stripe(member);
    const std::lock_guard lock(mutex_);
    if (--num_left_ == 0) {
      changed_.notify_all();
    }
  }
}

// What it reads stays as it is until every member is through with it.
void CopyTeam::copy_stripe(int64_t member) const {
  const auto size = static_cast<int64_t>(members_.size()) + 1;
  const int64_t begin = bytes_ * member / size;
  const int64_t end = bytes_ * (member + 1) / size;
  std::memcpy(target_ + begin, source_ + begin, static_cast<size_t>(end - begin));
}

}  // namespace blockswap
