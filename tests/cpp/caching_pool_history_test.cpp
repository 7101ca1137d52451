// The pool through long histories: at random, with calls that fail, from many threads.

#include "../../csrc/device/caching_pool.h"

#include <algorithm>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "pool_on_manual_device.h"

using namespace blockswap;
using namespace blockswap::test;
using Fixture = PoolOnManualDevice;

namespace {

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

TEST(a_pool_that_dies_on_a_broken_device_says_nothing) {
  for (const bool is_bad_memory : {false, true}) {
    const auto device = std::make_shared<ManualDevice>();
    CachingPool pool(device, make_host_pages(64 * kMiB, kPage), CachingPool::kNoLimit);
    pool.free(pool.allocate(kMiB, kA), kA);
    if (is_bad_memory) {
      device->fail_with_bad_alloc();
    } else {
      device->fail_at(1);
    }
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
