// Address space of the arena: how images are laid out, when pages are taken and given back.

#include "../../csrc/host_arena.h"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <random>
#include <thread>
#include <vector>

#include "../../csrc/error.h"
#include "../../csrc/os.h"
#include "../../csrc/plan.h"
#include "arena_sources.h"
#include "check.h"

using blockswap::ArenaLayout;
using blockswap::ConfigError;
using blockswap::HostArena;
using namespace blockswap::test;

TEST(layout_keeps_images_in_order_aligned_and_inside_chunks_with_little_padding) {
  std::mt19937 random(7);
  for (int round = 0; round < 300; ++round) {
    const int64_t chunk_bytes = 4_KiB << (random() % 9);
    const auto sizes = odd_sizes(random() % 60, 300_KiB, static_cast<unsigned>(round));
    const ArenaLayout layout = HostArena::make_layout(sizes, chunk_bytes);
    const auto& chunks = layout.chunk_offsets;
    CHECK(layout.image_offsets.size() == sizes.size() && chunks.front() == 0);
    int64_t end = 0;
    int64_t used = 0;
    for (size_t i = 0; i < sizes.size(); ++i) {
      const int64_t begin = layout.image_offsets[i];
      CHECK(begin % blockswap::kAlignment == 0 && begin >= end);
      end = begin + sizes[i];
      used += (sizes[i] + 255) / 256 * 256;
      const auto next = std::upper_bound(chunks.begin(), chunks.end(), begin);
      CHECK(next == chunks.end() || *next >= end);
      if (end - *std::prev(next) > chunk_bytes) CHECK(begin == *std::prev(next));
    }
    CHECK(layout.bytes >= end && layout.bytes <= used + 4096 * int64_t(chunks.size() - 1));
    for (size_t c = 1; c < chunks.size(); ++c) {
      CHECK(chunks[c] % 4096 == 0 && chunks[c] > chunks[c - 1] && chunks[c] < layout.bytes);
    }
  }
}

TEST(an_arena_takes_no_physical_memory_until_it_is_written) {
  HostArena arena(64_MiB + 5);
  CHECK(arena.resident_bytes() == 0);
  CHECK(reinterpret_cast<uintptr_t>(arena.data()) % blockswap::os::kHugePageBytes == 0);
  arena.data()[64_MiB + 4] = 1;  // the tail must not draw a huge page past the end
  CHECK(arena.resident_bytes() == 4096);
}

TEST(an_arena_that_the_system_refuses_names_its_bytes) {
  CHECK_THROWS(HostArena(int64_t{1} << 50), ConfigError, "1024.00 TiB");
}

TEST(release_gives_whole_pages_back_and_keeps_neighbours) {
  HostArena arena(8_MiB);
  std::memset(arena.data(), 5, static_cast<size_t>(arena.bytes()));
  CHECK(arena.resident_bytes() == 8_MiB);
  arena.release(256, 12_KiB);  // pages 1 and 2 are whole; parts of 0 and 3 belong to others
  CHECK(arena.resident_bytes() == 8_MiB - 8_KiB);
  CHECK(arena.data()[255] == 5 && arena.data()[256 + 12_KiB] == 5);
  arena.release(256 + 12_KiB, 4_KiB - 300);  // up to the end of page 3: its size is rounded up
  CHECK(arena.resident_bytes() == 8_MiB - 12_KiB);
  arena.release(0, 200);  // page 0 is nobody's any more
  CHECK(arena.resident_bytes() == 8_MiB - 16_KiB);
  CHECK(arena.data()[16_KiB] == 5);
}

TEST(tensors_that_die_on_many_threads_give_everything_back) {
  const auto sizes = odd_sizes(400, 100_KiB);
  Sources sources(sizes);
  CHECK(sources.arena->fill(sources.copies, 2));
  std::vector<std::thread> threads;
  for (size_t t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      for (size_t i = t; i < sizes.size(); i += 4) {
        sources.arena->release(sources.copies[i].offset, sizes[i]);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(sources.arena->resident_bytes() == 0);
}

int main() { return blockswap::test::run_all(); }
