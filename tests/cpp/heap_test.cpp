// The heap against a model that holds one entry per 512 bytes.

#include "../../csrc/device/heap.h"

#include <algorithm>
#include <map>
#include <random>
#include <string>

#include "../../csrc/error.h"
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

// What the heap must do, said with one entry per unit.
class Model {
 public:
  explicit Model(const std::vector<std::pair<uint64_t, int64_t>>& ranges) {
    for (const auto& [address, bytes] : ranges) {
      for (int64_t at = 0; at < bytes; at += kUnit) {
        units_[address + static_cast<uint64_t>(at)] = Unit{Heap::kNobody, 0, false, at == 0};
      }
    }
  }
  struct Unit {
    Heap::Owner owner;
    int64_t tick;
    bool used;
    bool begins_range;
  };
  struct Run {
    uint64_t address;
    int64_t bytes;
    Heap::Owner owner;
    int64_t tick;
  };

  // Maximal runs of unused units of one owner: exactly the heap's unused blocks.
  std::vector<Run> runs() const {
    std::vector<Run> found;
    bool open = false;
    for (const auto& [address, unit] : units_) {
      if (unit.used) {
        open = false;
      } else if (open && !unit.begins_range && found.back().owner == unit.owner) {
        found.back().bytes += kUnit;
        found.back().tick = std::max(found.back().tick, unit.tick);
      } else {
        found.push_back({address, kUnit, unit.owner, unit.tick});
        open = true;
      }
    }
    return found;
  }
  // Where allocate() must put it; 0 = nowhere.
  uint64_t fit(int64_t bytes, Heap::Owner owner) const {
    for (const Heap::Owner from : {owner, Heap::kAnyone}) {
      const Run* best = nullptr;
      const std::vector<Run> all = runs();
      for (const Run& run : all) {
        if (run.owner == from && run.bytes >= bytes &&
            (best == nullptr || run.bytes < best->bytes)) {
          best = &run;
        }
      }
      if (best != nullptr) {
        return best->address;
      }
    }
    return 0;
  }
  template <typename Change>
  void change(uint64_t address, int64_t bytes, const Change& change) {
    for (int64_t at = 0; at < bytes; at += kUnit) {
      change(units_.at(address + static_cast<uint64_t>(at)));
    }
  }
  int64_t count(bool (*holds)(const Unit&)) const {
    return std::count_if(units_.begin(), units_.end(),
                         [holds](const auto& each) { return holds(each.second); }) *
           kUnit;
  }
  // Merging spreads the latest tick over the whole run.
  void spread_ticks() {
    for (const Run& run : runs()) {
      change(run.address, run.bytes, [&](Unit& unit) { unit.tick = run.tick; });
    }
  }

 private:
  std::map<uint64_t, Unit> units_;
};

void play(uint32_t seed) {
  const std::vector<std::pair<uint64_t, int64_t>> ranges{
      {kBase, 20 * kPage}, {kBase + 20 * kPage, 12 * kPage}, {kBase + 99 * kPage, 6 * kPage}};
  std::mt19937 random(seed);
  const auto draw = [&random](int64_t below) { return static_cast<int64_t>(random()) % below; };
  Heap heap;
  for (const auto& [address, bytes] : ranges) {
    heap.add_range(address, bytes);
  }
  Model model(ranges);
  std::vector<Heap::Block*> held;
  int64_t tick = 1;
  for (int step = 0; step < 4000; ++step) {
    const auto owner = static_cast<Heap::Owner>(draw(3));
    const int64_t bytes = (1 + draw(draw(4) == 0 ? 40 : 6)) * kUnit;
    const int64_t dice = draw(20);
    if (dice < 9) {
      const uint64_t expected = model.fit(bytes, owner);
      Heap::Block* block = heap.allocate(bytes, owner);
      CHECK((block == nullptr ? 0 : block->address) == expected);
      if (block == nullptr) {
        const auto hole = heap.find_hole(bytes, owner, kPage);
        if (!hole) continue;
        CHECK(hole->bytes <= (bytes + kPage - 1) / kPage * kPage);
        CHECK(hole->address % static_cast<uint64_t>(kPage) == 0 && hole->bytes % kPage == 0);
        model.change(hole->address, hole->bytes, [](Model::Unit& unit) {
          CHECK(!unit.used && unit.owner == Heap::kNobody);
          unit = {Heap::kAnyone, 0, false, unit.begins_range};
        });
        const uint64_t address = hole->address;
        heap.map(*hole, owner);
        for (const Model::Run& run : model.runs()) {  // the run with the new pages is the owner's
          if (run.address <= address && address < run.address + static_cast<uint64_t>(run.bytes)) {
            model.change(run.address, run.bytes, [&](Model::Unit& unit) { unit.owner = owner; });
          }
        }
        model.spread_ticks();
        block = heap.allocate(bytes, owner);
        CHECK(block != nullptr);
      }
      model.change(block->address, block->bytes, [&](Model::Unit& unit) {
        CHECK(!unit.used && (unit.owner == owner || unit.owner == Heap::kAnyone));
        unit.used = true;
        unit.owner = owner;
      });
      CHECK(block->bytes == bytes);
      held.push_back(block);
    } else if (dice < 17 && !held.empty()) {
      std::swap(held[static_cast<size_t>(draw(static_cast<int64_t>(held.size())))], held.back());
      ++tick;
      model.change(held.back()->address, held.back()->bytes, [&](Model::Unit& unit) {
        CHECK(unit.used);
        unit.used = false;
        unit.tick = tick;
      });
      heap.free(held.back(), tick);
      held.pop_back();
    } else if (dice == 17) {
      for (const Heap::Span& span : heap.whole_pages(kPage)) {
        if (draw(2) == 0) continue;
        model.change(span.address, span.bytes, [](Model::Unit& unit) {
          CHECK(!unit.used && unit.owner == Heap::kAnyone);
          unit.owner = Heap::kNobody;
          unit.tick = 0;
        });
        heap.unmap(span);
      }
    } else if (dice == 18) {
      const int64_t done = tick - draw(30);
      for (const Model::Run& run : model.runs()) {
        if (run.owner == owner && run.tick <= done) {
          model.change(run.address, run.bytes,
                       [](Model::Unit& unit) { unit.owner = Heap::kAnyone, unit.tick = 0; });
        }
      }
      heap.disown(owner, done);
    } else if (dice == 19 && draw(3) == 0) {
      for (const Model::Run& run : model.runs()) {
        if (run.owner == Heap::kAnyone) {
          model.change(run.address, run.bytes, [&](Model::Unit& unit) { unit.owner = owner; });
        }
      }
      heap.claim(owner);
    } else if (dice == 19 && draw(3) == 0) {
      for (const Model::Run& run : model.runs()) {
        if (run.owner != owner && run.owner != Heap::kNobody) {
          model.change(run.address, run.bytes,
                       [&](Model::Unit& unit) { unit.owner = owner, unit.tick = tick; });
        }
      }
      heap.adopt(owner, tick);
    }
    model.spread_ticks();
    heap.check_valid();
    const std::vector<Model::Run> runs = model.runs();
    auto run = runs.begin();
    heap.visit([&](const Heap::Block& block) {
      if (!block.used && run != runs.end()) {
        CHECK(run->address == block.address && run->bytes == block.bytes);
        CHECK(run->owner == block.owner && run->tick == block.tick);
        ++run;
      }
    });
    CHECK(run == runs.end());
    CHECK(heap.used_bytes() == model.count([](const Model::Unit& unit) { return unit.used; }));
    CHECK(heap.mapped_bytes() == model.count([](const Model::Unit& unit) {
      return unit.used || unit.owner != Heap::kNobody;
    }));
  }
}

TEST(any_history_is_that_of_a_model_with_one_entry_per_unit) {
  for (uint32_t seed = 1; seed <= 6; ++seed) {
    play(seed);
  }
}

}  // namespace

int main() { return blockswap::test::run_all(); }
