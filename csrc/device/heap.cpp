#include "heap.h"

#include <algorithm>
#include <limits>
#include <sstream>

#include "../error.h"

namespace blockswap {
namespace {

bool are_one(const Heap::Block* left, const Heap::Block* right) {
  return left != nullptr && right != nullptr && !left->used && !right->used &&
         left->owner == right->owner;
}

// Free bytes beside a hole that a stream may have at once.
int64_t usable_bytes(const Heap::Block* block, Heap::Owner owner) {
  const bool usable = block != nullptr && block->is_free() &&
                      (block->owner == owner || block->owner == Heap::kAnyone);
  return usable ? block->bytes : 0;
}

int64_t round_up(int64_t bytes, int64_t unit) { return (bytes + unit - 1) / unit * unit; }

void require(bool condition, const char* what, const Heap::Block& block) {
  if (!condition) {
    std::ostringstream text;
    text << "the heap is broken at 0x" << std::hex << block.address << ": " << what;
    throw UseError(text.str());
  }
}

}  // namespace

Heap::Block* Heap::make_block(uint64_t address, int64_t bytes, Owner owner) {
  Block* block = nullptr;
  if (spare_.empty()) {
    block = &blocks_.emplace_back();
  } else {
    block = spare_.back();
    spare_.pop_back();
  }
  *block = Block{};
  block->address = address;
  block->bytes = bytes;
  block->owner = owner;
  return block;
}

// The part behind `bytes` becomes a block of its own. Neither is listed as unused by this.
Heap::Block* Heap::split(Block* block, int64_t bytes) {
  Block* rest =
      make_block(block->address + static_cast<uint64_t>(bytes), block->bytes - bytes, block->owner);
  rest->tick = block->tick;
  rest->before = block;
  rest->after = block->after;
  if (rest->after != nullptr) {
    rest->after->before = rest;
  }
  block->after = rest;
  block->bytes = bytes;
  return rest;
}

void Heap::absorb_next(Block* block) {
  Block* next = block->after;
  block->bytes += next->bytes;
  block->tick = std::max(block->tick, next->tick);
  block->after = next->after;
  if (block->after != nullptr) {
    block->after->before = block;
  }
  spare_.push_back(next);
}

// Merges an unused block with its neighbours, lists the result and returns it. The left one
// absorbs: the first block of a range stays the first.
Heap::Block* Heap::settle(Block* block) {
  if (are_one(block, block->after)) {
    unused_.erase(key_of(block->after));
    absorb_next(block);
  }
  if (are_one(block->before, block)) {
    block = block->before;
    unused_.erase(key_of(block));
    absorb_next(block);
  }
  unused_.insert(key_of(block));
  return block;
}

void Heap::give(Block* block, Owner owner, int64_t tick) {
  unused_.erase(key_of(block));
  block->owner = owner;
  block->tick = tick;
  settle(block);
}

// The span as a block of its own, not listed as unused; what is left on both sides stays listed.
Heap::Block* Heap::cut_out(const Span& span) {
  Block* block = span.block;
  unused_.erase(key_of(block));
  if (span.address > block->address) {
    Block* head = block;
    block = split(head, static_cast<int64_t>(span.address - head->address));
    unused_.insert(key_of(head));
  }
  if (span.bytes < block->bytes) {
    unused_.insert(key_of(split(block, span.bytes)));
  }
  return block;
}

void Heap::add_range(uint64_t address, int64_t bytes) {
  Block* block = make_block(address, bytes, kNobody);
  ranges_.emplace(address, block);
  unused_.insert(key_of(block));
}

void Heap::remove_range(uint64_t address) {
  const auto range = ranges_.find(address);
  unused_.erase(key_of(range->second));
  spare_.push_back(range->second);
  ranges_.erase(range);
}

Heap::Block* Heap::best_fit(Owner owner, int64_t bytes) const {
  const auto found = unused_.lower_bound({owner, bytes, 0, nullptr});
  return found != unused_.end() && found->owner == owner ? found->block : nullptr;
}

Heap::Block* Heap::allocate(int64_t bytes, Owner owner) {
  Block* block = best_fit(owner, bytes);
  return block != nullptr ? take(block, bytes, owner) : allocate_unused(bytes, owner);
}

Heap::Block* Heap::allocate_unused(int64_t bytes, Owner owner) {
  Block* block = best_fit(kAnyone, bytes);
  return block != nullptr ? take(block, bytes, owner) : nullptr;
}

Heap::Block* Heap::take(Block* block, int64_t bytes, Owner owner) {
  auto listed = unused_.extract(key_of(block));
  if (block->bytes > bytes) {
    listed.value() = key_of(split(block, bytes));
    unused_.insert(std::move(listed));  // the same node: the commonest case costs no malloc
    ++num_splits_;
  }
  block->owner = owner;
  block->used = true;
  used_bytes_ += bytes;
  return block;
}

void Heap::free(Block* block, int64_t tick) {
  used_bytes_ -= block->bytes;
  block->used = false;
  block->tick = tick;
  settle(block);
}

std::vector<Heap::Block*> Heap::blocks_of(Owner owner) const {
  std::vector<Block*> blocks;
  auto each = unused_.lower_bound({owner, 0, 0, nullptr});
  for (; each != unused_.end() && each->owner == owner; ++each) {
    blocks.push_back(each->block);
  }
  return blocks;
}

std::optional<Heap::Span> Heap::find_hole(int64_t bytes, Owner owner, int64_t page_bytes) const {
  std::optional<Span> best;
  const auto consider = [&best](Block* hole, uint64_t address, int64_t map_bytes) {
    if (!best || map_bytes < best->bytes || (map_bytes == best->bytes && address < best->address)) {
      best = Span{hole, address, map_bytes};
    }
  };
  for (Block* hole : blocks_of(kNobody)) {
    const int64_t lead = usable_bytes(hole->before, owner);
    const int64_t trail = usable_bytes(hole->after, owner);
    const int64_t behind_lead = round_up(bytes - lead, page_bytes);
    const int64_t before_trail = round_up(bytes - trail, page_bytes);
    if (behind_lead <= hole->bytes) {
      consider(hole, hole->address, behind_lead);
    }
    if (before_trail <= hole->bytes) {
      consider(hole, hole->end() - static_cast<uint64_t>(before_trail), before_trail);
    }
    if (lead + hole->bytes + trail >= bytes) {
      consider(hole, hole->address, hole->bytes);
    }
  }
  return best;
}

void Heap::map(const Span& span, Owner owner) {
  Block* block = cut_out(span);
  mapped_bytes_ += block->bytes;
  block->owner = kAnyone;  // merges with what is anyone's first, then with what is the owner's
  give(settle(block), owner, 0);
}

void Heap::unmap(const Span& span) {
  Block* block = cut_out(span);
  block->owner = kNobody;
  block->tick = 0;
  mapped_bytes_ -= block->bytes;
  settle(block);
}

std::vector<Heap::Span> Heap::whole_pages(int64_t page_bytes) const {
  const auto unit = static_cast<uint64_t>(page_bytes);
  std::vector<Span> spans;
  for (Block* block : blocks_of(kAnyone)) {  // the smallest first
    const uint64_t begin = (block->address + unit - 1) / unit * unit;
    const uint64_t end = block->end() / unit * unit;
    if (begin < end) {
      spans.push_back({block, begin, static_cast<int64_t>(end - begin)});
    }
  }
  std::reverse(spans.begin(), spans.end());
  return spans;
}

std::vector<Heap::Span> Heap::whole_ranges(Owner owner) const {
  std::vector<Span> spans;
  for (const auto& [address, block] : ranges_) {
    if (!block->used && block->owner == owner && block->after == nullptr) {
      spans.push_back({block, address, block->bytes});
    }
  }
  return spans;
}

void Heap::disown(Owner owner, int64_t done) {
  for (Block* block : blocks_of(owner)) {
    if (block->tick <= done) {
      give(block, kAnyone, 0);
    }
  }
}

void Heap::claim(Owner owner) {
  for (Block* block : blocks_of(kAnyone)) {
    give(block, owner, 0);
  }
}

void Heap::adopt(Owner owner, int64_t tick) {
  std::vector<Block*> others;
  for (const Key& key : unused_) {
    if (key.owner != owner && key.owner != kNobody) {
      others.push_back(key.block);
    }
  }
  for (Block* block : others) {
    give(block, owner, tick);
  }
}

void Heap::visit(const std::function<void(const Block&)>& visitor) const {
  for (const auto& [address, first] : ranges_) {
    for (const Block* block = first; block != nullptr; block = block->after) {
      visitor(*block);
    }
  }
}

void Heap::check_valid() const {
  int64_t used_bytes = 0;
  int64_t mapped_bytes = 0;
  size_t num_unused = 0;
  visit([&](const Block& block) {
    const Block* before = block.before;
    require(block.bytes > 0 && block.bytes % kAlignment == 0, "a block of no such size", block);
    require(before == nullptr || before->end() == block.address, "a gap or an overlap", block);
    require(block.after == nullptr || block.after->before == &block, "links disagree", block);
    require(!are_one(before, &block), "two unused neighbours of one owner", block);
    require(!block.used || block.owner >= 0, "in use by nobody", block);
    const auto listed = unused_.find(key_of(const_cast<Block*>(&block)));
    const bool is_listed = listed != unused_.end() && listed->block == &block;
    require(is_listed != block.used, "listed as unused while in use, or not listed", block);
    used_bytes += block.used ? block.bytes : 0;
    mapped_bytes += block.used || block.is_free() ? block.bytes : 0;
    num_unused += block.used ? 0 : 1;
  });
  const Block whole;
  require(num_unused == unused_.size(), "blocks are listed that do not exist", whole);
  require(used_bytes == used_bytes_ && mapped_bytes == mapped_bytes_, "bytes do not add up", whole);
}

}  // namespace blockswap
