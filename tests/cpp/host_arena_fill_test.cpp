// Filling the arena: every copy is whole or untouched, however fill ends, and memory stays bounded.

#include "../../csrc/host_arena.h"

#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <thread>
#include <vector>

#include "../../csrc/error.h"
#include "arena_sources.h"
#include "check.h"

using blockswap::HostArena;
using blockswap::UseError;
using namespace blockswap::test;

namespace {

#if !IS_SANITIZED
int64_t process_resident_bytes() {
  long long size = 0;
  long long resident = 0;
  std::FILE* file = std::fopen("/proc/self/statm", "r");
  CHECK(file != nullptr && std::fscanf(file, "%lld %lld", &size, &resident) == 2);
  if (file != nullptr) std::fclose(file);
  return resident * sysconf(_SC_PAGESIZE);
}
#endif

}  // namespace

TEST(fill_brings_every_byte_of_many_odd_sizes_and_nothing_beside_them) {
  for (const int num_threads : {1, 4}) {
    auto sizes = odd_sizes(IS_SANITIZED ? 60 : 300, IS_SANITIZED ? 100_KiB : 1_MiB);
    sizes.insert(sizes.begin() + 20, {0, 1, 17_MiB + 11});  // the large one in parts
    if (!IS_SANITIZED) sizes.insert(sizes.begin() + 30, {37_MiB + 11, 16_MiB, 16_MiB + 1});
    Sources sources(sizes);
    CHECK(sources.arena->fill(sources.copies, num_threads));
    CHECK(sources.check_whole_or_untouched() == sizes.size());
    for (size_t i = 0; i + 1 < sizes.size(); ++i) {
      CHECK(sources.is_zero(sources.copies[i].offset + sizes[i], sources.copies[i + 1].offset));
    }
    CHECK(sources.arena->resident_bytes() <= sources.layout.bytes + 4096);
  }
}

TEST(progress_ends_with_all_bytes) {
  Sources sources(odd_sizes(50, 100_KiB));
  int64_t last = -1;
  sources.arena->fill(sources.copies, 2, [&](int64_t done) {
    CHECK(done >= last);
    last = done;
    return true;
  });
  int64_t total = 0;
  for (const auto& copy : sources.copies) total += copy.bytes;
  CHECK(last == total);
}

TEST(sources_not_yet_dropped_never_pass_the_bound) {
  HostArena arena(40 * 64_KiB);
  const std::vector<uint8_t> source(64_KiB, 3);
  std::atomic<int> num_open{0};
  std::atomic<int> most_open{0};
  std::vector<HostArena::Copy> copies;
  for (int64_t i = 0; i < 40; ++i) {
    copies.push_back({source.data(), i * 64_KiB, 64_KiB, [&] {
                        const int now = ++num_open;
                        for (int most = most_open; now > most;) {
                          if (most_open.compare_exchange_weak(most, now)) break;
                        }
                        sleep_ms(5);
                        --num_open;
                      }});
  }
  CHECK(arena.fill(copies, 8, {}, {}, 3 * 64_KiB));
  CHECK(most_open <= 3);
}

#if !IS_SANITIZED
TEST(host_memory_never_holds_two_copies_of_the_weights) {
  const int64_t before = process_resident_bytes();
  constexpr int64_t kBytes = 12_MiB;
  constexpr int64_t kTotal = 24 * kBytes;
  HostArena arena(kTotal);
  std::vector<HostArena::Copy> copies;
  std::atomic<int64_t> peak{0};
  for (int64_t i = 0; i < 24; ++i) {
    void* source =
        mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    std::memset(source, 9, kBytes);
    copies.push_back({source, i * kBytes, kBytes, [source, &peak] {
                        const int64_t now = process_resident_bytes();
                        for (int64_t most = peak; now > most;) {
                          if (peak.compare_exchange_weak(most, now)) break;
                        }
                        munmap(source, kBytes);
                      }});
  }
  CHECK(arena.fill(copies, 2, {}, {}, 2 * kBytes));
  CHECK(peak - before > kTotal);  // the figure means something
  CHECK(peak - before < kTotal + kTotal / 10);
  CHECK(process_resident_bytes() - before < kTotal + kTotal / 50);
}
#endif

TEST(cancel_in_the_middle_leaves_each_copy_whole_or_untouched_and_fill_can_go_on) {
  Sources sources(std::vector<int64_t>(150, 20001));
  std::atomic<bool> asked{false};
  hold_from(sources, 70, asked);
  CHECK(!sources.arena->fill(sources.copies, 2, [&](int64_t done) {
    asked = done >= 70 * 20001;
    return !asked;
  }));
  const size_t n = sources.check_whole_or_untouched();
  CHECK(n >= 70 && n < 150);
  CHECK(sources.arena->fill(sources.copies, 3));
  CHECK(sources.check_whole_or_untouched() == 150);
}

TEST(a_large_copy_that_was_started_is_finished_after_a_cancel) {
  Sources sources({100, IS_SANITIZED ? 40_MiB : 96_MiB, 100});
  sources.copies[0].safe = [&sources, drop = sources.copies[0].safe] {
    drop();
    while (sources.arena->resident_bytes() < 8_MiB) std::this_thread::yield();
    throw std::runtime_error("stop");  // while the other worker is inside the large copy
  };
  CHECK_THROWS(sources.arena->fill(sources.copies, 2, {}, {}, 200_MiB), std::runtime_error, "stop");
  CHECK(sources.check_whole_or_untouched() >= 2);
}

TEST(an_exception_from_safe_or_progress_comes_through_and_fill_can_go_on) {
  Sources sources(std::vector<int64_t>(60, 9001));
  std::atomic<bool> thrown{false};
  hold_from(sources, 25, thrown);
  sources.copies[20].safe = [&] {
    sources.drop(20);
    thrown = true;
    throw std::runtime_error("the source would not die");
  };
  CHECK_THROWS(sources.arena->fill(sources.copies, 3), std::runtime_error, "would not die");
  const size_t n = sources.check_whole_or_untouched();
  CHECK(n > 20 && n < 60);

  std::atomic<bool> asked{false};
  hold_from(sources, n, asked);
  const auto interrupt = [&](int64_t) -> bool {
    asked = true;
    throw std::runtime_error("Ctrl-C");
  };
  CHECK_THROWS(sources.arena->fill(sources.copies, 2, interrupt), std::runtime_error, "Ctrl-C");
  CHECK(sources.check_whole_or_untouched() < 60);
  CHECK(sources.arena->fill(sources.copies, 2));
  CHECK(sources.check_whole_or_untouched() == 60);
}

TEST(copies_that_overlap_or_leave_the_arena_are_refused_before_a_byte_moves) {
  HostArena arena(1_MiB);
  const std::vector<uint8_t> source(1_MiB, 1);
  std::vector<HostArena::Copy> over{{source.data(), 0, 300, {}}, {source.data(), 256, 256, {}}};
  CHECK_THROWS(arena.fill(over), UseError, "overlap at offset 256");
  std::vector<HostArena::Copy> past{{source.data(), 0, 300, {}}, {source.data(), 512, 1_MiB, {}}};
  CHECK_THROWS(arena.fill(past), UseError, "1048576 bytes at offset 512");
  CHECK(arena.resident_bytes() == 0);
}

TEST(default_num_threads_is_between_one_and_sixteen) {
  CHECK(HostArena::default_num_threads() >= 1 && HostArena::default_num_threads() <= 16);
}

int main() { return blockswap::test::run_all(); }
