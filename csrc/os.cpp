// Linux (WSL2 included).
#include "os.h"

#include <malloc.h>
#include <sched.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23  // Linux 5.14; older C libraries do not name it
#endif

namespace blockswap::os {
namespace {

// A plain static atomic: it must outlive every object whose destructor asks.
std::atomic<bool> exiting{false};

// Cores granted by a cgroup quota, rounded up; 0 when there is none.
int num_quota_cores() {
  long quota = -1;
  long period = 0;
  if (std::FILE* file = std::fopen("/sys/fs/cgroup/cpu.max", "r")) {  // version 2; "max" = none
    if (std::fscanf(file, "%ld %ld", &quota, &period) != 2) {
      quota = -1;
    }
    std::fclose(file);
  } else {  // version 1; -1 = none
    const auto read_number = [](const char* path, long& number) {
      if (std::FILE* one = std::fopen(path, "r")) {
        if (std::fscanf(one, "%ld", &number) != 1) {
          number = -1;
        }
        std::fclose(one);
      }
    };
    read_number("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", quota);
    read_number("/sys/fs/cgroup/cpu/cpu.cfs_period_us", period);
  }
  return quota > 0 && period > 0 ? static_cast<int>((quota + period - 1) / period) : 0;
}

// mmap aligns to a page only: reserve more, cut off both ends.
void* try_map_aligned(int64_t bytes, int64_t alignment, int protection) {
  const size_t wanted = static_cast<size_t>(bytes);
  const size_t spare = static_cast<size_t>(alignment - page_bytes());
  void* raw = mmap(nullptr, wanted + spare, protection, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (raw == MAP_FAILED) {
    return nullptr;
  }
  char* const begin = static_cast<char*>(raw);
  const size_t past = reinterpret_cast<uintptr_t>(raw) & static_cast<size_t>(alignment - 1);
  const size_t head = past == 0 ? 0 : static_cast<size_t>(alignment) - past;
  if (head > 0) {
    munmap(begin, head);
  }
  if (spare > head) {
    munmap(begin + head + wanted, spare - head);
  }
  return begin + head;
}

}  // namespace

int64_t page_bytes() {
  static const int64_t bytes = sysconf(_SC_PAGESIZE);
  return bytes;
}

void* try_reserve(int64_t bytes, int64_t alignment) {
  return try_map_aligned(bytes, alignment, PROT_READ | PROT_WRITE);
}

void* try_reserve_addresses(int64_t bytes, int64_t alignment) {
  return try_map_aligned(bytes, alignment, PROT_NONE);
}

void unreserve(void* address, int64_t bytes) { munmap(address, static_cast<size_t>(bytes)); }

void advise_huge(void* address, int64_t bytes) {
  madvise(address, static_cast<size_t>(bytes), MADV_HUGEPAGE);
}

void advise_small(void* address, int64_t bytes) {
  madvise(address, static_cast<size_t>(bytes), MADV_NOHUGEPAGE);
}

bool populate(void* address, int64_t bytes) {
  int result = 0;
  do {
    result = madvise(address, static_cast<size_t>(bytes), MADV_POPULATE_WRITE);
  } while (result != 0 && (errno == EINTR || errno == EAGAIN));
  return result == 0;
}

void discard(void* address, int64_t bytes) {
  madvise(address, static_cast<size_t>(bytes), MADV_DONTNEED);
}

bool forbid(void* address, int64_t bytes) {
  discard(address, bytes);
  return mprotect(address, static_cast<size_t>(bytes), PROT_NONE) == 0;
}

bool allow(void* address, int64_t bytes) {
  return mprotect(address, static_cast<size_t>(bytes), PROT_READ | PROT_WRITE) == 0;
}

int64_t resident_bytes(const void* address, int64_t bytes) {
  constexpr int64_t kSlicePages = 16384;
  std::vector<unsigned char> present(kSlicePages);
  const int64_t slice_bytes = kSlicePages * page_bytes();
  int64_t num_pages = 0;
  for (int64_t begin = 0; begin < bytes; begin += slice_bytes) {
    const int64_t slice = std::min(slice_bytes, bytes - begin);
    char* at = static_cast<char*>(const_cast<void*>(address)) + begin;
    if (mincore(at, static_cast<size_t>(slice), present.data()) != 0) {
      return 0;
    }
    num_pages += std::count_if(present.begin(), present.begin() + slice / page_bytes(),
                               [](unsigned char page) { return (page & 1) != 0; });
  }
  return num_pages * page_bytes();
}

void return_freed_memory() {
#ifdef __GLIBC__
  malloc_trim(0);
#endif
}

int num_usable_cores() {
  cpu_set_t cores;
  int num_cores = static_cast<int>(std::thread::hardware_concurrency());
  if (sched_getaffinity(0, sizeof cores, &cores) == 0) {  // fails on more than 1024 cores
    num_cores = CPU_COUNT(&cores);
  }
  if (const int quota = num_quota_cores(); quota > 0) {
    num_cores = std::min(num_cores, quota);
  }
  return std::max(num_cores, 1);
}

bool process_is_exiting() { return exiting.load(std::memory_order_relaxed); }

void watch_exit() {
  // A static initialised once is the once-flag.
  static const int registered = std::atexit([] { exiting.store(true, std::memory_order_relaxed); });
  static_cast<void>(registered);
}

}  // namespace blockswap::os
