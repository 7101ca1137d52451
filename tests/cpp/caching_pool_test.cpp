// Blocks of the pool: who may have one that was freed, and what is told of them.

#include "../../csrc/device/caching_pool.h"

#include "pool_on_manual_device.h"

using namespace blockswap;
using namespace blockswap::test;
using Fixture = PoolOnManualDevice;

namespace {

TEST(a_freed_block_is_had_at_once_on_its_stream_and_costs_no_call) {
  Fixture f;
  void* first = f.use(3 * kMiB, kA);
  f.pool->free(first, kA);
  const int64_t calls = f.device->num_calls();
  for (int i = 0; i < 9; ++i) {
    void* again = f.use(3 * kMiB, kA);
    CHECK(again == first);
    f.pool->free(again, kA);
  }
  CHECK(f.device->num_calls() == calls);
}

TEST(a_freed_block_is_had_on_another_stream_only_when_its_work_is_over) {
  Fixture f;
  void* first = f.use(3 * kMiB, kA);
  f.pool->free(first, kA);
  void* other = f.use(3 * kMiB, kB);
  CHECK(other != first);
  f.device->finish(kA, 1);
  CHECK(f.use(3 * kMiB, kB) == first);
  CHECK(f.device->num_waits() == 0);
}

TEST(work_enqueued_behind_a_freed_block_does_not_keep_it) {
  Fixture f;
  void* first = f.use(136 * kMiB, kA);  // large enough to be marked when it is freed
  f.pool->free(first, kA);
  f.device->enqueue(kA);
  f.device->finish(kA, 1);
  CHECK(f.use(136 * kMiB, kB) == first);
}

TEST(a_block_that_another_stream_uses_waits_for_it) {
  Fixture f;
  void* shared = f.use(3 * kMiB, kA);
  f.pool->record_use(shared, kB);
  f.pool->record_use(shared, kB);
  f.shared->uses.note(shared, 3 * kMiB, kB, f.device->enqueue(kB));
  f.pool->free(shared, kA);
  CHECK(f.pool->stats().pending_bytes == 3 * kMiB);
  CHECK(f.pool->stats().allocated_bytes == 0);
  CHECK(f.use(3 * kMiB, kA) != shared);
  f.device->finish(kB, 1);
  CHECK(f.use(3 * kMiB, kA) == shared);
  CHECK(f.pool->stats().pending_bytes == 0);
}

TEST(a_block_freed_on_another_stream_was_used_there) {
  Fixture f;
  void* block = f.use(3 * kMiB, kA);
  f.shared->uses.note(block, 3 * kMiB, kB, f.device->enqueue(kB));
  f.pool->free(block, kB);
  CHECK(f.use(3 * kMiB, kA) != block);
}

TEST(a_block_is_in_use_while_its_stream_waits_for_one_that_used_it) {
  Fixture f;
  void* block = f.use(3 * kMiB, kA);
  f.shared->uses.note(block, 3 * kMiB, kB, f.device->enqueue(kB));
  const Device::Event used = f.device->make_event(Device::EventKind::kOrders);
  f.device->record(used, kB);
  f.device->wait(kA, used);  // as PyTorch's users do instead of record_use
  f.device->destroy_event(used);
  f.pool->free(block, kA);
  f.device->finish(kA, 1);
  CHECK(f.pool->give_back(INT64_MAX) == 0);
  CHECK(f.use(3 * kMiB, kC) != block);
  f.device->finish(kB, 1);
  CHECK(f.use(3 * kMiB, kC) == block);
}

TEST(a_stream_that_is_destroyed_takes_no_memory_with_it) {
  Fixture f(12 * kMiB);
  void* block = f.use(6 * kMiB, kA);
  void* later = f.use(3 * kMiB, kA);
  void* shared = f.use(kMiB, kB);
  f.pool->record_use(shared, kA);
  f.shared->uses.note(shared, kMiB, kA, f.device->enqueue(kA));
  f.device->destroy_under_the_pool(kA);
  f.pool->free(block, kA);
  f.pool->free(shared, kB);  // A's use of it needs a mark: the host waits
  CHECK(f.device->num_synchronized() == 1);
  CHECK(f.use(6 * kMiB, kB) == block);
  CHECK(f.use(kMiB, kB) == shared);
  CHECK(f.device->num_synchronized() == 1);
  f.pool->free(later, kA);
  CHECK(f.use(3 * kMiB, kB) == later);  // the device is asked, the stream is not
  CHECK(f.device->num_synchronized() == 2);
  f.pool.reset();
  CHECK(f.device->num_calls_on_dead() == 1);
}

TEST(a_stream_destroyed_while_nobody_looks_is_not_touched_by_a_pool_that_ends) {
  Fixture f;
  f.pool->free(f.use(3 * kMiB, kA), kA);
  f.device->destroy_under_the_pool(kA);
  f.pool.reset();
  CHECK(f.device->num_calls_on_dead() == 0);
}

TEST(a_new_stream_with_a_dead_ones_handle_waits_for_nobody) {
  Fixture f(16 * kMiB);
  void* block = f.use(6 * kMiB, kA);
  f.device->destroy_under_the_pool(kA);
  f.pool->free(block, kA);
  f.pool->free(f.use(14 * kMiB, kB), kB);  // takes A's: the host waits for the device
  CHECK(f.device->num_synchronized() == 1);
  f.device->make_anew(kA);
  f.device->finish_all();
  block = f.use(6 * kMiB, kA);
  f.pool->free(block, kA);
  CHECK(f.use(6 * kMiB, kB) != block);  // A still computes
  CHECK(f.device->num_synchronized() == 1);
}

TEST(a_block_whose_users_nobody_knows_is_free_for_all_once_the_device_is_done) {
  Fixture f;
  void* block = f.use(3 * kMiB, kA);
  f.shared->uses.note(block, 3 * kMiB, kC, f.device->enqueue(kC));  // the pool is not told
  f.pool->free_sync(block);
  CHECK(f.device->num_synchronized() == 1);
  CHECK(f.use(3 * kMiB, kB) == block);
  CHECK_THROWS(f.pool->free_sync(&f), UseError, "another allocator");
}

TEST(a_block_whose_last_use_is_over_is_anybodys_without_a_wait) {
  Fixture f;
  void* block = f.use(3 * kMiB, kA);
  f.device->finish_all();
  f.pool->free_unused(block);
  CHECK(f.device->num_synchronized() == 0);
  CHECK(f.use(3 * kMiB, kB) == block);
  f.device->finish_all();
  f.pool->free_unused(block);
  CHECK(f.pool->trim(0) > 0 && f.pool->stats().reserved_bytes == 0);
  CHECK(f.device->num_synchronized() == 0);
}

TEST(a_use_is_recorded_of_the_pools_own_blocks_only) {
  Fixture f;
  void* block = f.use(3 * kMiB, kA);
  CHECK(f.pool->try_record_use(block, kB));
  f.shared->uses.note(block, 3 * kMiB, kB, f.device->enqueue(kB));
  CHECK(!f.pool->try_record_use(&f, kB));
  f.pool->free(block, kA);
  CHECK(f.use(3 * kMiB, kA) != block);
}

TEST(small_blocks_lie_apart_from_large_ones) {
  Fixture f;
  const auto page_of = [](void* address) { return reinterpret_cast<uint64_t>(address) / kPage; };
  void* large = f.use(CachingPool::kSmallBytes + 1, kA);
  void* small = f.use(CachingPool::kSmallBytes, kA);
  CHECK(page_of(small) != page_of(large));
  CHECK(page_of(f.use(100, kA)) == page_of(small));
}

TEST(a_block_stays_its_callers_when_freeing_it_fails) {
  Fixture f;
  void* block = f.use(3 * kMiB, kA);
  f.pool->record_use(block, kB);
  f.shared->uses.note(block, 3 * kMiB, kB, f.device->enqueue(kB));
  f.device->fail_at(1);
  CHECK_THROWS(f.pool->free(block, kA), DeviceError, "make_event");
  f.device->fail_at(2);
  CHECK_THROWS(f.pool->free(block, kA), DeviceError, "record");
  CHECK(f.pool->stats().num_frees == 0);
  f.pool->free(block, kA);
  CHECK(f.use(3 * kMiB, kB) != block);
}

TEST(what_is_no_block_in_use_is_refused) {
  Fixture f;
  void* block = f.use(3 * kMiB, kA);
  f.pool->free(block, kA);
  CHECK_THROWS(f.pool->free(block, kA), UseError, "was freed before");
  CHECK_THROWS(f.pool->record_use(&f, kA), UseError, "another allocator");
  CHECK_THROWS(f.pool->allocate(0, kA), UseError, "0 bytes");
}

TEST(peaks_and_the_snapshot_add_up) {
  Fixture f;
  void* small = f.use(1000, kA);
  void* large = f.use(5 * kMiB, kB);
  f.pool->record_use(large, kA);
  f.shared->uses.note(large, 5 * kMiB, kA, f.device->enqueue(kA));
  f.pool->free(large, kB);
  int64_t bytes = 0, allocated = 0, pending = 0;
  for (const PoolSegment& segment : f.pool->snapshot()) {
    for (const PoolBlock& block : segment.blocks) {
      bytes += block.bytes;
      allocated += block.state == PoolBlock::State::kAllocated ? block.bytes : 0;
      pending += block.state == PoolBlock::State::kPendingFree ? block.bytes : 0;
    }
  }
  const PoolStats stats = f.pool->stats();
  CHECK(bytes == stats.reserved_bytes && bytes == f.mapped_bytes());
  CHECK(allocated == stats.allocated_bytes && allocated == 1024);
  CHECK(pending == stats.pending_bytes && pending == 5 * kMiB);
  CHECK(stats.peak_allocated_bytes == 5 * kMiB + 1024);
  CHECK(stats.num_allocations == 2 && stats.num_frees == 1);
  f.pool->free(small, kA);
  f.pool->reset_peaks();
  CHECK(f.pool->stats().peak_allocated_bytes == 0);
}

}  // namespace

int main() { return blockswap::test::run_all(); }
