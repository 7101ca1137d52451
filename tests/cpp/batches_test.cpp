// Pages that come and go together, alone and under the pool.

#include "../../csrc/device/batches.h"

#include <random>
#include <vector>

#include "pool_on_manual_device.h"

using namespace blockswap;
using namespace blockswap::test;

namespace {

constexpr int64_t kBatch = 8 * kMiB;

struct Fixture : PoolOnManualDevice {
  explicit Fixture(int64_t limit_bytes = CachingPool::kNoLimit)
      : PoolOnManualDevice(limit_bytes, 256 * kMiB, kPage, kBatch) {}
  void free_now(void* block) {
    pool->free(block, kA);
    device->finish_all();
  }
};

TEST(the_last_page_of_what_is_mapped_at_once_is_a_batch_of_its_own) {
  const Batches batches(kPage, kBatch);
  CHECK((batches.cut(kPage) == std::vector<int64_t>{kPage}));
  CHECK((batches.cut(2 * kPage) == std::vector<int64_t>{kPage, kPage}));
  CHECK((batches.cut(10 * kMiB) == std::vector<int64_t>{kBatch, kPage}));
  CHECK((batches.cut(20 * kMiB) == std::vector<int64_t>{kBatch, kBatch, kPage, kPage}));
}

TEST(what_is_whole_of_a_range_begins_and_ends_with_a_batch) {
  Batches batches(kPage, kBatch);
  uint64_t address = 0;
  for (const int64_t bytes : batches.cut(26 * kMiB)) {  // 8, 8, 8, 2
    batches.note(address, bytes);
    address += static_cast<uint64_t>(bytes);
  }
  const auto is = [&](PageRange range, uint64_t begin, int64_t bytes) {
    return range.bytes == bytes && (bytes == 0 || range.address == begin);
  };
  CHECK(is(batches.whole(0, 26 * kMiB, 26 * kMiB), 0, 26 * kMiB));
  CHECK(is(batches.whole(0, 26 * kMiB, 1), 0, kBatch));
  CHECK(is(batches.whole(0, 26 * kMiB, 9 * kMiB), 0, 2 * kBatch));
  CHECK(is(batches.whole(2 * kMiB, 20 * kMiB, 20 * kMiB), kBatch, kBatch));
  CHECK(is(batches.whole(2 * kMiB, 6 * kMiB, 6 * kMiB), 0, 0));
  CHECK(is(batches.whole(26 * kMiB, kPage, kPage), 0, 0));
  CHECK(batches.take(kBatch, 2 * kBatch).size() == 2);
  CHECK(is(batches.whole(0, 8 * kMiB, 1), 0, kBatch));
  CHECK(is(batches.whole(8 * kMiB, 8 * kMiB, 1), 0, 0));
}

TEST(a_block_behind_another_keeps_no_more_of_its_memory_than_the_page_they_share) {
  Fixture f;
  void* first = f.use(9 * kMiB, kA);
  void* second = f.use(9 * kMiB, kA);
  f.free_now(first);
  f.pool->trim(0);
  CHECK(f.mapped_bytes() == 10 * kMiB);  // 9 MiB, and the rest of the page in which it begins
  f.free_now(second);
  f.pool->trim(0);
  CHECK(f.mapped_bytes() == 0);
}

TEST(a_batch_of_which_a_part_is_in_use_stays_and_is_used_again) {
  Fixture f;
  f.free_now(f.use(17 * kMiB, kA));  // 8, 8, 2
  void* small = f.use(2 * kMiB, kA);
  f.device->finish_all();
  f.pool->trim(0);
  CHECK(f.mapped_bytes() == 8 * kMiB);
  void* beside = f.use(6 * kMiB, kA);
  CHECK(f.mapped_bytes() == 8 * kMiB);
  f.free_now(small);
  f.free_now(beside);
  CHECK(f.pool->give_back(1) == 8 * kMiB);
}

TEST(blocks_that_come_and_go_at_random_under_a_limit_leave_nothing_mapped) {
  std::mt19937 random(11);
  Fixture f(64 * kMiB);
  std::vector<void*> blocks;
  for (int step = 0; step < 3000; ++step) {
    if (blocks.empty() || random() % 2 == 0) {
      try {
        blocks.push_back(f.use((1 + static_cast<int64_t>(random() % 24)) * kMiB + 512, kA));
      } catch (const OutOfMemory&) {
        CHECK(!blocks.empty());
      }
    } else {
      std::swap(blocks[random() % blocks.size()], blocks.back());
      f.free_now(blocks.back());
      blocks.pop_back();
    }
    if (step % 7 == 0) f.pool->trim(0);
    CHECK(f.mapped_bytes() == f.pool->stats().reserved_bytes);
    CHECK(f.pool->stats().reserved_bytes <= 64 * kMiB);
  }
  for (void* block : blocks) f.free_now(block);
  f.pool->trim(0);
  CHECK(f.mapped_bytes() == 0);
}

}  // namespace

int main() { return blockswap::test::run_all(); }
