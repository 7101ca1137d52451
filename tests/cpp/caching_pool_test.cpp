// The pool on a device whose work is done when the test says so, over host memory that faults where
// it is not mapped.

#include "../../csrc/device/caching_pool.h"

#include <unistd.h>

#include <cstring>
#include <random>
#include <thread>

#include "manual_device.h"

using namespace blockswap;
using blockswap::test::ManualDevice;
using blockswap::test::WatchedPages;

namespace {

constexpr int64_t kKiB = 1024;
constexpr int64_t kMiB = 1024 * kKiB;
constexpr int64_t kPage = 2 * kMiB;
constexpr Device::Stream kA{0}, kB{1}, kC{2};

struct Fixture {
  explicit Fixture(int64_t limit_bytes = CachingPool::kNoLimit, int64_t memory_bytes = 256 * kMiB,
                   int64_t page_bytes = kPage)
      : device(std::make_shared<ManualDevice>()),
        shared(std::make_shared<WatchedPages::Shared>(*device)),
        pool(std::make_unique<CachingPool>(
            device, std::make_unique<WatchedPages>(shared, memory_bytes, page_bytes), limit_bytes,
            /*check=*/true)) {}
  ~Fixture() {
    pool.reset();
    CHECK(shared->mapped.empty());
    CHECK(shared->ranges.empty());
    CHECK(device->num_events() == 0);
  }
  // A block and work that uses it.
  void* use(int64_t bytes, Device::Stream stream) {
    void* address = pool->allocate(bytes, stream);
    CHECK(shared->uses.may_use(address, bytes, stream));
    shared->uses.note(address, bytes, stream, device->enqueue(stream));
    return address;
  }
  int64_t mapped_bytes() const { return static_cast<int64_t>(shared->mapped.size()) * kPage; }

  std::shared_ptr<ManualDevice> device;
  std::shared_ptr<WatchedPages::Shared> shared;
  std::unique_ptr<CachingPool> pool;
};

// Whether the system lets anybody read there: a pipe refuses what cannot be read.
bool is_readable(const void* address) {
  int ends[2];
  CHECK(pipe(ends) == 0);
  const bool readable = write(ends[1], address, 1) == 1;
  close(ends[0]);
  close(ends[1]);
  return readable;
}

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
  void* first = f.use(40 * kMiB, kA);  // large enough to be marked when it is freed
  f.pool->free(first, kA);
  f.device->enqueue(kA);
  f.device->finish(kA, 1);
  CHECK(f.use(40 * kMiB, kB) == first);
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
  CHECK_THROWS(f.use(9 * kMiB, kA), DeviceError, "no 9.0 MiB");
  CHECK(asked.size() == 3);
  CHECK(f.pool->stats().num_retries == 3);
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

TEST(small_blocks_lie_apart_from_large_ones) {
  Fixture f;
  const auto page_of = [](void* address) { return reinterpret_cast<uint64_t>(address) / kPage; };
  void* large = f.use(CachingPool::kSmallBytes + 1, kA);
  void* small = f.use(CachingPool::kSmallBytes, kA);
  CHECK(page_of(small) != page_of(large));
  CHECK(page_of(f.use(100, kA)) == page_of(small));
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

// Three streams allocate, use, share, free and give back at random while their work gets done bit
// by bit. The fixture checks each block and each unmapped page against who used it last.
void play(Fixture& f, uint32_t seed, int num_steps) {
  struct Held {
    char* address;
    int64_t bytes;
    Device::Stream stream;
    char fill;
  };
  std::mt19937 random(seed);
  const auto draw = [&random](int64_t below) { return static_cast<int64_t>(random()) % below; };
  std::vector<Held> held;
  const auto drop = [&](size_t index) {
    std::swap(held[index], held.back());
    const Held& each = held.back();
    CHECK(each.address[0] == each.fill && each.address[each.bytes - 1] == each.fill);
    f.pool->free(each.address, each.stream);
    held.pop_back();
  };
  for (int step = 0; step < num_steps; ++step) {
    const Device::Stream stream{static_cast<uint64_t>(draw(3))};
    const int64_t dice = draw(20);
    try {
      if (dice < 9) {
        const int64_t bytes = 1 + (draw(3) == 0 ? draw(200 * kKiB) : draw(20 * kKiB));
        auto* address = static_cast<char*>(f.use(bytes, stream));
        const char fill = static_cast<char>(step);
        address[0] = address[bytes - 1] = fill;
        held.push_back({address, bytes, stream, fill});
      } else if (dice < 16 && !held.empty()) {
        drop(static_cast<size_t>(draw(static_cast<int64_t>(held.size()))));
      } else if (dice == 16 && !held.empty()) {
        f.pool->record_use(held.back().address, stream);
        f.shared->uses.note(held.back().address, held.back().bytes, stream,
                            f.device->enqueue(stream));
      } else if (dice == 17) {
        f.device->finish(stream, f.device->enqueue(stream));
      } else if (dice == 18) {
        f.pool->give_back(draw(300 * kKiB));
      }
    } catch (const DeviceError&) {  // memory is out, or the test made a call fail
      if (!held.empty()) drop(0);
    }
    const PoolStats stats = f.pool->stats();
    CHECK(stats.allocated_bytes + stats.pending_bytes <= stats.reserved_bytes);
  }
  while (!held.empty()) drop(0);
  f.device->finish_all();
  f.pool->give_back(INT64_MAX);
  CHECK(f.pool->stats().reserved_bytes == 0 && f.shared->mapped.empty());
}

TEST(no_memory_is_handed_on_before_its_last_use_is_over) {
  for (uint32_t seed = 1; seed <= 4; ++seed) {
    Fixture f(seed % 2 == 0 ? 600 * kKiB : CachingPool::kNoLimit, 800 * kKiB, 16 * kKiB);
    play(f, seed, 1500);
    CHECK(f.pool->stats().peak_reserved_bytes <= (seed % 2 == 0 ? 600 : 800) * kKiB);
  }
}

TEST(whichever_call_into_the_device_fails_everything_stays_valid) {
  for (int64_t call = 1; call <= 120; ++call) {
    Fixture f(400 * kKiB, 800 * kKiB, 16 * kKiB);
    f.device->fail_at(call);
    play(f, 7, 150);
  }
}

TEST(threads_share_the_pool) {
  const auto device = make_cpu_device();
  CachingPool pool(device, make_host_pages(64 * kMiB, kPage), 48 * kMiB);
  std::vector<std::thread> threads;
  for (int id = 0; id < 4; ++id) {
    threads.emplace_back([&pool, id] {
      std::mt19937 random(static_cast<uint32_t>(id));
      const Device::Stream stream{static_cast<uint64_t>(id)};
      for (int round = 0; round < 400; ++round) {
        const int64_t bytes = 1 + static_cast<int64_t>(random() % (3 * kMiB));
        auto* block = static_cast<char*>(pool.allocate(bytes, stream));
        std::memset(block, id, static_cast<size_t>(std::min<int64_t>(bytes, 4096)));
        if (round % 16 == 0) pool.give_back(kMiB);
        CHECK(block[0] == id && block[std::min<int64_t>(bytes, 4096) - 1] == id);
        pool.free(block, stream);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(pool.stats().allocated_bytes == 0 && pool.stats().peak_reserved_bytes <= 48 * kMiB);
}

}  // namespace

int main() { return blockswap::test::run_all(); }
