// The heap against a model that holds one entry per 512 bytes.

#include "../../csrc/device/heap.h"

#include <algorithm>
#include <map>
#include <random>
#include <utility>
#include <vector>

#include "check.h"

using namespace blockswap;

namespace {

constexpr int64_t kUnit = Heap::kAlignment;
constexpr int64_t kPage = 8 * kUnit;
constexpr uint64_t kBase = uint64_t{1} << 40;

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
