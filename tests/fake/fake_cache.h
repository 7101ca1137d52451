// What the fake accelerator keeps of freed memory, as PyTorch's caching allocator does on CUDA.
//
// Pure bookkeeping: a place is an address that nobody reads. Each allocation has bytes of its own
// all the same, so a late reader of a place that was given out again finds poison.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <tuple>

namespace fake {

// One device's. Segments are what the device gave; pieces tile them, and no two neighbours are
// free. A piece serves only the stream for which its segment came. The caller locks.
class Cache {
 public:
  struct Piece {
    size_t bytes;
    uint64_t segment;  // where it begins
    int64_t stream;
    bool is_small;
    bool is_free;
  };

  // What the device must give for a request that finds no piece.
  static size_t segment_bytes(size_t bytes);

  // A place within what is kept; none: no free piece is large enough.
  std::optional<uint64_t> try_take(size_t bytes, int64_t stream);
  // A place in a new segment.
  uint64_t take_new(size_t bytes, int64_t stream);
  void put(uint64_t place);
  // Forgets the segments that are wholly free, and returns their bytes.
  size_t give_back();

  // May be more than was asked for: what is left of a piece can be too little to be one.
  size_t bytes_of(uint64_t place) const { return pieces_.at(place).bytes; }
  const std::map<uint64_t, Piece>& pieces() const { return pieces_; }

 private:
  using Pieces = std::map<uint64_t, Piece>;
  // Ordered as PyTorch's: the best fit is the first that is large enough.
  using Key = std::tuple<bool, int64_t, size_t, uint64_t>;

  static Key key_of(Pieces::const_iterator piece);
  uint64_t take(Pieces::iterator piece, size_t bytes);
  void merge_next(Pieces::iterator piece);

  Pieces pieces_;
  std::set<Key> free_;
  std::map<uint64_t, size_t> segments_;
  uint64_t next_segment_ = 0;
};

}  // namespace fake
