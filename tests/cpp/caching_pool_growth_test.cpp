// Memory of the pool: how it grows up to a limit, what is tried before memory is out, what is given
// back.

#include "../../csrc/device/caching_pool.h"

#include <unistd.h>

#include <cstring>
#include <vector>

#include "pool_on_manual_device.h"

using namespace blockswap;
using namespace blockswap::test;
using Fixture = PoolOnManualDevice;

namespace {

// Whether the system lets anybody read there: a pipe refuses what cannot be read.
bool is_readable(const void* address) {
  int ends[2];
  CHECK(pipe(ends) == 0);
  const bool readable = write(ends[1], address, 1) == 1;
  close(ends[0]);
  close(ends[1]);
  return readable;
}

TEST(at_the_limit_a_stream_waits_on_the_device_for_what_others_freed) {
  Fixture f(8 * kMiB);
  f.pool->free(f.use(6 * kMiB, kA), kA);
  void* block = f.use(6 * kMiB, kB);
  CHECK(f.device->num_waits() == 1);
  CHECK(f.device->num_synchronized() == 0);
  f.pool->free(block, kB);
  f.use(6 * kMiB, kC);  // C must wait for B and, through it, for A
  CHECK(f.device->num_synchronized() == 0);
}

TEST(the_limit_is_never_passed_and_the_error_has_the_numbers) {
  Fixture f(8 * kMiB);
  void* block = f.use(6 * kMiB, kA);
  CHECK_THROWS(f.use(4 * kMiB, kA), DeviceError, "no 4.0 MiB");
  CHECK_THROWS(f.use(4 * kMiB, kA), DeviceError, "6.0 MiB are in use, the limit is 8.0 MiB");
  CHECK(f.pool->stats().num_ooms == 2);
  CHECK(f.pool->stats().reserved_bytes <= 8 * kMiB);
  f.pool->free(block, kA);
  f.pool->free(f.use(8 * kMiB, kA), kA);
  CHECK(f.pool->stats().peak_reserved_bytes == 8 * kMiB);
}

TEST(memory_that_the_driver_refuses_is_reported_in_its_words) {
  Fixture f(CachingPool::kNoLimit, 8 * kMiB);
  f.use(6 * kMiB, kA);
  CHECK_THROWS(f.use(4 * kMiB, kA), DeviceError, "6.0 MiB of 8.0 MiB are mapped");
}

TEST(free_pages_serve_a_larger_block_elsewhere_when_memory_is_short) {
  Fixture f(16 * kMiB);
  std::vector<void*> blocks;
  for (int i = 0; i < 8; ++i) blocks.push_back(f.use(2 * kMiB, kA));
  for (size_t i = 0; i < 8; i += 2) f.pool->free(blocks[i], kA);
  f.device->finish_all();
  f.use(8 * kMiB, kA);
  CHECK(f.pool->stats().reserved_bytes == 16 * kMiB);
  CHECK(f.device->num_synchronized() == 0);
}

TEST(the_host_waits_only_before_it_would_report_that_memory_is_out) {
  Fixture f(16 * kMiB);
  std::vector<void*> blocks;
  for (int i = 0; i < 8; ++i) blocks.push_back(f.use(2 * kMiB, kA));
  for (size_t i = 0; i < 8; i += 2) f.pool->free(blocks[i], kA);
  f.use(8 * kMiB, kA);  // the pages are in use until A is done
  CHECK(f.device->num_synchronized() == 1);
}

TEST(what_no_limit_or_device_could_hold_is_refused_before_anything_is_given_up_for_it) {
  Fixture f(8 * kMiB, 16 * kMiB);
  f.pool->free(f.use(6 * kMiB, kA), kA);
  bool asked = false;
  f.pool->set_on_pressure([&asked](int64_t) { return asked = true; });
  const int64_t calls = f.device->num_calls();
  CHECK_THROWS(f.use(9 * kMiB, kA), OutOfMemory, "the limit is 8.0 MiB");
  f.pool->set_limit(CachingPool::kNoLimit);
  CHECK_THROWS(f.use(17 * kMiB, kA), OutOfMemory, "the device has 16.0 MiB in all");
  CHECK(!asked);
  CHECK(f.device->num_calls() == calls);
  CHECK(f.mapped_bytes() == 6 * kMiB);
}

TEST(without_addresses_no_page_is_given_back) {
  Fixture f;
  f.pool->free(f.use(6 * kMiB, kA), kA);  // the large blocks have their range, the small ones none
  f.device->finish_all();
  f.shared->refuse_ranges = true;
  CHECK_THROWS(f.use(1000, kA), OutOfMemory, "no range");
  CHECK(f.mapped_bytes() == 6 * kMiB);
}

TEST(an_error_that_is_not_about_memory_is_not_taken_for_one) {
  Fixture f;
  f.shared->breaks = true;
  CHECK_THROWS(f.use(3 * kMiB, kA), DeviceError, "the driver is broken");
  CHECK(f.pool->stats().num_ooms == 0);
  f.shared->breaks = false;
  f.use(3 * kMiB, kA);
}

TEST(pressure_is_asked_for_bytes_and_may_free_into_the_pool) {
  Fixture f(8 * kMiB);
  std::vector<void*> residents{f.use(3 * kMiB, kA), f.use(3 * kMiB, kA)};
  std::vector<int64_t> asked;
  f.pool->set_on_pressure([&](int64_t bytes) {
    asked.push_back(bytes);
    if (residents.empty()) return false;
    f.pool->free(residents.back(), kA);
    residents.pop_back();
    return true;
  });
  f.pool->free(f.use(8 * kMiB - 512, kA), kA);
  CHECK(asked == std::vector<int64_t>({8 * kMiB - 512, 8 * kMiB - 512}));
  f.use(8 * kMiB - 512, kA);
  CHECK_THROWS(f.use(kMiB, kA), OutOfMemory, "no 1.0 MiB");
  CHECK(asked.size() == 3);
  CHECK(f.pool->stats().num_retries == 3);
}

TEST(a_promise_that_brings_nothing_is_believed_once) {
  Fixture f(8 * kMiB);
  void* block = f.use(8 * kMiB, kA);
  int num_asked = 0;
  f.pool->set_on_pressure([&num_asked](int64_t) { return ++num_asked > 0; });
  CHECK_THROWS(f.use(kMiB, kA), OutOfMemory, "no 1.0 MiB");
  CHECK(num_asked == 1);
  f.pool->set_on_pressure([&](int64_t) {
    if (++num_asked == 3) f.pool->free(block, kA);
    return true;
  });
  CHECK_THROWS(f.use(kMiB, kA), OutOfMemory, "no 1.0 MiB");
  CHECK(num_asked == 2);
  f.use(kMiB, kA);
  CHECK(num_asked == 3);
}

TEST(what_pressure_allocates_itself_asks_nobody) {
  Fixture f(8 * kMiB);
  f.use(8 * kMiB, kA);
  int num_asked = 0;
  f.pool->set_on_pressure([&](int64_t) {
    if (++num_asked > 3) return false;
    CHECK_THROWS(f.use(kMiB, kA), OutOfMemory, "no 1.0 MiB");
    return false;
  });
  CHECK_THROWS(f.use(kMiB, kA), OutOfMemory, "no 1.0 MiB");
  CHECK(num_asked == 1);
}

TEST(what_is_given_back_is_gone_and_its_addresses_live_again) {
  Fixture f;
  char* block = static_cast<char*>(f.use(8 * kMiB, kA));
  std::memset(block, 1, 8 * kMiB);
  f.pool->free(block, kA);
  CHECK(f.pool->give_back(kMiB) == 0);  // A still works on it
  CHECK(is_readable(block));
  f.device->finish_all();
  CHECK(f.pool->give_back(3 * kMiB) == 4 * kMiB);  // whole pages
  CHECK(f.mapped_bytes() == 4 * kMiB);
  CHECK(f.pool->stats().reserved_bytes == 4 * kMiB);
  CHECK(f.pool->give_back(INT64_MAX) == 4 * kMiB);
  CHECK(!is_readable(block) && !is_readable(block + 8 * kMiB - 1));
  CHECK(f.use(8 * kMiB, kA) == block);
  CHECK(is_readable(block) && is_readable(block + 8 * kMiB - 1));
  CHECK(f.device->num_synchronized() == 0);
}

TEST(pages_with_a_block_in_use_stay) {
  Fixture f;
  void* large = f.use(3 * kMiB, kA);
  void* after = f.use(3 * kMiB, kA);
  f.pool->free(large, kA);
  f.device->finish_all();
  CHECK(f.pool->give_back(INT64_MAX) == 2 * kMiB);  // the second page holds a part of `after`
  std::memset(after, 1, 3 * kMiB);
  f.pool->free(after, kA);
}

TEST(what_is_over_merges_with_what_is_not_for_the_stream_that_may_have_both) {
  Fixture f;
  void* over = f.use(2 * kMiB, kA);
  void* recent = f.use(2 * kMiB, kA);
  f.use(2 * kMiB, kA);
  f.pool->free(f.use(8 * kMiB, kA), kA);
  f.pool->free(over, kA);
  f.device->finish_all();
  f.pool->give_back(8 * kMiB);  // the largest block first: `over` stays, anyone's
  f.shared->uses.note(recent, 2 * kMiB, kA, f.device->enqueue(kA));
  f.pool->free(recent, kA);
  CHECK(f.use(4 * kMiB, kA) == over);
  CHECK(f.mapped_bytes() == 6 * kMiB);
}

TEST(trim_keeps_what_it_is_told_to_keep) {
  Fixture f;
  f.use(8 * kMiB, kA);
  f.pool->free(f.use(16 * kMiB, kA), kA);
  f.device->finish_all();
  CHECK(f.pool->trim(5 * kMiB) == 12 * kMiB);
  CHECK(f.pool->trim(5 * kMiB) == 0);
  CHECK(f.pool->trim(0) == 4 * kMiB);
}

TEST(a_lower_limit_gives_back_what_is_free) {
  Fixture f;
  void* kept = f.use(6 * kMiB, kA);
  f.pool->free(f.use(10 * kMiB, kA), kA);
  f.device->finish_all();
  f.pool->set_limit(8 * kMiB);
  CHECK(f.pool->stats().reserved_bytes == 8 * kMiB);
  f.pool->set_limit(2 * kMiB);
  CHECK(f.pool->stats().reserved_bytes == 6 * kMiB);
  CHECK_THROWS(f.use(512, kA), DeviceError, "the limit is 2.0 MiB");
  f.pool->free(kept, kA);
}

TEST(a_graph_gets_memory_that_nobody_uses_without_a_call_on_a_stream) {
  Fixture f(16 * kMiB);
  void* own = f.use(10 * kMiB, kC);
  f.pool->free(own, kC);  // C may have it, but the graph may run on any stream
  const int64_t calls = f.device->num_calls();
  void* block = f.pool->allocate_unused(4 * kMiB, kC);
  CHECK(block != own && f.mapped_bytes() == 14 * kMiB);
  CHECK_THROWS(f.pool->allocate_unused(4 * kMiB, kC), OutOfMemory, "the limit is 16.0 MiB");
  CHECK(f.device->num_calls() == calls + 1);  // of map()
  f.pool->free_sync(block);
  CHECK(f.pool->allocate_unused(4 * kMiB, kA) == block);
}

TEST(a_graph_may_have_the_pages_of_free_blocks_whose_use_is_over) {
  Fixture f(8 * kMiB);
  f.pool->free(f.use(8 * kMiB, kA), kA);
  f.device->finish_all();
  f.pool->give_back(2 * kMiB);
  f.pool->free_sync(f.pool->allocate_unused(kMiB, kB));  // small blocks lie on pages of their own
  f.pool->free_sync(f.pool->allocate_unused(8 * kMiB, kB));
  CHECK(f.mapped_bytes() == 8 * kMiB);
}

TEST(a_device_without_pages_gives_and_takes_whole_segments) {
  const auto device = std::make_shared<ManualDevice>();
  CachingPool pool(device, make_segment_pages(device), 64 * kMiB, true);
  void* small = pool.allocate(1000, kA);
  void* middle = pool.allocate(3 * kMiB, kA);
  void* large = pool.allocate(11 * kMiB, kA);
  CHECK(device->live_bytes() == (2 + 20) * kMiB);  // the 20 are shared
  CHECK(pool.stats().reserved_bytes == device->live_bytes());
  CHECK_THROWS(pool.allocate(43 * kMiB, kA), DeviceError, "the limit is 64.0 MiB");
  pool.free(middle, kA);
  CHECK(pool.give_back(1) == 0);
  pool.free(large, kA);
  CHECK(pool.give_back(1) == 20 * kMiB);
  CHECK(device->live_bytes() == 2 * kMiB);
  pool.free(pool.allocate(43 * kMiB, kA), kA);
  pool.free(small, kA);
  CHECK(pool.give_back(INT64_MAX) == (2 + 44) * kMiB);
  CHECK(device->live_bytes() == 0);
}

}  // namespace

int main() { return blockswap::test::run_all(); }
