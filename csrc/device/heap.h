#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <optional>
#include <set>
#include <vector>

namespace blockswap {

// Bookkeeping of device addresses: which are in use, which are free and for whom, which have no
// memory behind them. PURE: no device, no clock, no lock; an address is a number.
//
// A range is a row of blocks without gaps between them. A block that is not in use has an owner:
//   a stream   its last user, numbered by the caller: it may have the block at once;
//   kAnyone    every stream may have it at once: its last use is over;
//   kNobody    a hole: no memory is mapped there.
// Its `tick` is the moment of its last use in the owner's own count; what merges keeps the latest.
//
// Invariant: unused neighbours of one owner are one block; blocks of two ranges never merge.
// Allocating takes the smallest block that fits, the lowest address among equals. Everything is
// O(log blocks) but for what says O(blocks).
class Heap {
 public:
  using Owner = int32_t;
  static constexpr Owner kAnyone = -1;
  static constexpr Owner kNobody = -2;
  // Sizes are multiples of this. As in PyTorch: kernels are chosen by alignment, so that a tensor
  // must not be aligned worse here than there.
  static constexpr int64_t kAlignment = 512;

  struct Block {
    uint64_t address = 0;
    int64_t bytes = 0;
    int64_t tick = 0;
    Block* before = nullptr;  // neighbours in the range
    Block* after = nullptr;
    Owner owner = kNobody;
    bool used = false;

    uint64_t end() const { return address + static_cast<uint64_t>(bytes); }
    bool is_free() const { return !used && owner != kNobody; }
  };

  // A part of an unused block, in whole pages.
  struct Span {
    Block* block = nullptr;
    uint64_t address = 0;
    int64_t bytes = 0;
  };

  Heap() = default;
  Heap(const Heap&) = delete;
  Heap& operator=(const Heap&) = delete;

  // A new range is one hole. pre: it overlaps no other.
  void add_range(uint64_t address, int64_t bytes);
  // pre: the range is one hole again.
  void remove_range(uint64_t address);

  // A block of exactly `bytes` for a stream, from its own blocks or else from anyone's; nullptr
  // when none is large enough. It stays the caller's until free().
  Block* allocate(int64_t bytes, Owner owner);
  // The same from anyone's alone: what nobody uses any more, whatever the stream did before.
  Block* allocate_unused(int64_t bytes, Owner owner);
  // The block was last used by its owner, at `tick`.
  void free(Block* block, int64_t tick);

  // Where to map the fewest pages so that allocate(bytes, owner) succeeds then; it has just failed.
  // Free bytes beside a hole count. O(holes).
  std::optional<Span> find_hole(int64_t bytes, Owner owner, int64_t page_bytes) const;
  // Part of a hole has memory now; with free neighbours of anyone it becomes the owner's.
  void map(const Span& span, Owner owner);
  // The whole pages of what is anyone's, the largest block first. O(blocks).
  std::vector<Span> whole_pages(int64_t page_bytes) const;
  // The ranges that are one block of that owner each. O(ranges).
  std::vector<Span> whole_ranges(Owner owner) const;
  // Part of a free block becomes a hole.
  void unmap(const Span& span);

  // What the owner used last at `done` or before becomes anyone's. O(blocks).
  void disown(Owner owner, int64_t done);
  // What is anyone's becomes the owner's and merges with what only it may have. O(blocks).
  void claim(Owner owner);
  // The owner may have all that is free, as if used last at `tick`. O(blocks).
  void adopt(Owner owner, int64_t tick);

  int64_t used_bytes() const { return used_bytes_; }
  int64_t mapped_bytes() const { return mapped_bytes_; }
  int64_t num_splits() const { return num_splits_; }
  // In the order of addresses. O(blocks).
  void visit(const std::function<void(const Block&)>& visitor) const;
  // Throws UseError, naming the address, when the invariant does not hold. O(blocks).
  void check_valid() const;

 private:
  // An unused block, in the order in which allocate() looks.
  struct Key {
    Owner owner;
    int64_t bytes;
    uint64_t address;
    Block* block;

    bool operator<(const Key& other) const {
      if (owner != other.owner) return owner < other.owner;
      return bytes != other.bytes ? bytes < other.bytes : address < other.address;
    }
  };

  static Key key_of(Block* block) { return {block->owner, block->bytes, block->address, block}; }
  std::vector<Block*> blocks_of(Owner owner) const;
  Block* best_fit(Owner owner, int64_t bytes) const;
  Block* take(Block* block, int64_t bytes, Owner owner);
  Block* make_block(uint64_t address, int64_t bytes, Owner owner);
  Block* split(Block* block, int64_t bytes);
  void absorb_next(Block* block);
  Block* settle(Block* block);
  void give(Block* block, Owner owner, int64_t tick);
  Block* cut_out(const Span& span);

  std::set<Key> unused_;
  std::map<uint64_t, Block*> ranges_;  // first block of each, by address
  std::deque<Block> blocks_;           // never moves: pointers stay valid
  std::vector<Block*> spare_;
  int64_t used_bytes_ = 0;
  int64_t mapped_bytes_ = 0;
  int64_t num_splits_ = 0;
};

}  // namespace blockswap
