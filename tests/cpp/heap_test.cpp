// The heap: who may have which block, what merges, what can be mapped and unmapped.

#include "../../csrc/device/heap.h"

#include <algorithm>

#include "check.h"

using namespace blockswap;

namespace {

constexpr int64_t kUnit = Heap::kAlignment;
constexpr int64_t kPage = 8 * kUnit;
constexpr uint64_t kBase = uint64_t{1} << 40;

// A heap of one range whose first pages are mapped for stream 0.
struct Fixture {
  explicit Fixture(int64_t num_pages) {
    heap.add_range(kBase, 64 * kPage);
    heap.map(*heap.find_hole(num_pages * kPage, 0, kPage), 0);
  }
  ~Fixture() { heap.check_valid(); }
  Heap heap;
};

TEST(the_smallest_block_that_fits_is_taken_and_split) {
  Fixture f(4);
  Heap::Block* large = f.heap.allocate(6 * kUnit, 0);
  Heap::Block* wall = f.heap.allocate(kUnit, 0);
  Heap::Block* small = f.heap.allocate(3 * kUnit, 0);
  f.heap.allocate(kUnit, 0);
  const uint64_t expected = small->address;
  f.heap.free(large, 1);
  f.heap.free(small, 1);
  CHECK(f.heap.allocate(2 * kUnit, 0)->address == expected);
  CHECK(f.heap.allocate(kUnit, 0)->address == expected + 2 * kUnit);
  CHECK(f.heap.allocate(kUnit, 0)->address == kBase);
  CHECK(wall->used);
}

TEST(freed_neighbours_become_one_block_whatever_the_order) {
  std::vector<int> order{0, 1, 2, 3};
  do {
    Fixture f(1);
    std::vector<Heap::Block*> blocks;
    for (int i = 0; i < 4; ++i) {
      blocks.push_back(f.heap.allocate(2 * kUnit, 0));
    }
    CHECK(f.heap.allocate(kUnit, 0) == nullptr);
    for (const int i : order) {
      f.heap.free(blocks[static_cast<size_t>(i)], 1);
      f.heap.check_valid();
    }
    CHECK(f.heap.allocate(kPage, 0) != nullptr);
  } while (std::next_permutation(order.begin(), order.end()));
}

TEST(a_block_goes_to_another_stream_only_when_its_last_use_is_over) {
  Fixture f(1);
  f.heap.free(f.heap.allocate(kPage, 0), 7);
  CHECK(f.heap.allocate(kUnit, 1) == nullptr);
  f.heap.disown(0, 6);
  CHECK(f.heap.allocate(kUnit, 1) == nullptr);
  f.heap.disown(0, 7);
  CHECK(f.heap.allocate(kUnit, 1) != nullptr);
  CHECK(f.heap.allocate(kUnit, 0) != nullptr);
}

TEST(a_merged_block_was_last_used_when_its_later_half_was) {
  for (const bool left_first : {false, true}) {
    Fixture f(1);
    Heap::Block* left = f.heap.allocate(kPage / 2, 0);
    Heap::Block* right = f.heap.allocate(kPage / 2, 0);
    f.heap.free(left_first ? left : right, 3);
    f.heap.free(left_first ? right : left, 9);
    f.heap.disown(0, 8);
    CHECK(f.heap.allocate(kUnit, 1) == nullptr);
    f.heap.disown(0, 9);
    CHECK(f.heap.allocate(kPage, 1) != nullptr);
  }
}

TEST(adopting_makes_one_block_of_all_streams_blocks) {
  Fixture f(1);
  Heap::Block* left = f.heap.allocate(kPage / 2, 0);
  f.heap.free(f.heap.allocate(kPage / 2, 0), 1);
  f.heap.disown(0, 1);
  Heap::Block* right = f.heap.allocate(kPage / 2, 1);
  f.heap.free(left, 2);
  f.heap.free(right, 2);
  CHECK(f.heap.allocate(kPage, 2) == nullptr);
  f.heap.adopt(2, 5);
  CHECK(f.heap.allocate(kPage, 2) != nullptr);
}

TEST(a_hole_grows_the_free_block_beside_it_by_the_fewest_pages) {
  Fixture f(4);
  Heap::Block* first = f.heap.allocate(kPage, 0);
  Heap::Block* middle = f.heap.allocate(2 * kPage, 0);
  const auto hole = f.heap.find_hole(3 * kPage, 0, kPage);  // one page is free before the end
  CHECK(hole && hole->address == kBase + 4 * kPage && hole->bytes == 2 * kPage);
  f.heap.free(first, 1);
  f.heap.disown(0, 1);
  f.heap.unmap(f.heap.whole_pages(kPage).back());
  f.heap.free(middle, 2);
  f.heap.claim(0);
  const auto front = f.heap.find_hole(4 * kPage, 0, kPage);  // three are free, a hole on each side
  CHECK(front && front->address == kBase && front->bytes == kPage);
  f.heap.map(*front, 0);
  CHECK(f.heap.allocate(4 * kPage, 0)->address == kBase);
}

TEST(a_hole_grows_the_free_block_behind_it_from_its_end) {
  Fixture f(4);
  Heap::Block* first = f.heap.allocate(2 * kPage, 0);
  Heap::Block* middle = f.heap.allocate(kPage, 0);
  f.heap.allocate(kPage, 0);
  f.heap.free(first, 1);
  f.heap.disown(0, 1);
  f.heap.unmap(f.heap.whole_pages(kPage).front());
  f.heap.free(middle, 2);
  const auto hole = f.heap.find_hole(2 * kPage, 0, kPage);
  CHECK(hole && hole->address == kBase + kPage && hole->bytes == kPage);
}

TEST(another_streams_block_beside_a_hole_does_not_count) {
  Fixture f(1);
  const auto hole = f.heap.find_hole(2 * kPage, 1, kPage);
  CHECK(hole && hole->bytes == 2 * kPage);
  f.heap.disown(0, 0);
  const auto shorter = f.heap.find_hole(2 * kPage, 1, kPage);
  CHECK(shorter && shorter->bytes == kPage);
  f.heap.map(*shorter, 1);
  CHECK(f.heap.allocate(2 * kPage, 1)->address == kBase);
}

TEST(only_whole_pages_that_nobody_uses_can_be_unmapped) {
  Fixture f(4);
  Heap::Block* head = f.heap.allocate(kUnit, 0);
  CHECK(f.heap.whole_pages(kPage).empty());
  f.heap.disown(0, 0);
  const std::vector<Heap::Span> spans = f.heap.whole_pages(kPage);
  CHECK(spans.size() == 1 && spans[0].address == kBase + kPage && spans[0].bytes == 3 * kPage);
  f.heap.unmap(spans[0]);
  CHECK(f.heap.mapped_bytes() == kPage);
  CHECK(f.heap.whole_pages(kPage).empty());
  f.heap.free(head, 1);
  f.heap.disown(0, 1);
  CHECK(f.heap.whole_pages(kPage).size() == 1);
}

TEST(claiming_merges_what_is_anyones_with_what_is_not_over_yet) {
  Fixture f(1);
  Heap::Block* left = f.heap.allocate(kPage / 2, 0);
  f.heap.disown(0, 0);
  f.heap.free(left, 1);
  CHECK(f.heap.allocate(kPage, 0) == nullptr);
  f.heap.claim(0);
  CHECK(f.heap.allocate(kPage, 0) == left);
}

TEST(blocks_of_two_ranges_never_merge) {
  Heap heap;
  heap.add_range(kBase, kPage);
  heap.add_range(kBase + kPage, kPage);
  CHECK(!heap.find_hole(2 * kPage, 0, kPage));
  heap.map(*heap.find_hole(kPage, 0, kPage), 0);
  Heap::Block* first = heap.allocate(kPage, 0);
  heap.map(*heap.find_hole(kPage, 0, kPage), 0);
  heap.free(first, 1);
  CHECK(heap.allocate(2 * kPage, 0) == nullptr);
  CHECK(heap.whole_ranges(0).size() == 2);
  heap.unmap(heap.whole_ranges(0)[0]);
  heap.remove_range(kBase);
  heap.check_valid();
  CHECK(heap.mapped_bytes() == kPage);
}

}  // namespace

int main() { return blockswap::test::run_all(); }
