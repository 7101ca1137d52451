#pragma once

#include <cstdint>
#include <map>
#include <vector>

namespace blockswap {

struct PageRange {
  uint64_t address = 0;
  int64_t bytes = 0;  // 0: none
};

// Which pages come and go together. A driver takes as long for one handle of 2 MiB as for one of
// 32 (H200: some 40 us), but unmaps a handle only as a whole. PURE.
//
// The last page of what is mapped at once is a batch of its own: the block behind it may begin
// there, and would otherwise keep the whole batch.
class Batches {
 public:
  // pre: most_bytes is a multiple of page_bytes.
  Batches(int64_t page_bytes, int64_t most_bytes)
      : page_bytes_(page_bytes), most_bytes_(most_bytes) {}

  // In which batches to map so many bytes.
  std::vector<int64_t> cut(int64_t bytes) const;
  void note(uint64_t address, int64_t bytes) { batches_.emplace(address, bytes); }
  // The batches of a range that consists of whole ones, which are forgotten.
  std::vector<PageRange> take(uint64_t address, int64_t bytes);
  // The first whole batches of a mapped range, until they are that many bytes or there are no more.
  PageRange whole(uint64_t address, int64_t bytes, int64_t at_least_bytes) const;

 private:
  int64_t page_bytes_;
  int64_t most_bytes_;
  std::map<uint64_t, int64_t> batches_;
};

}  // namespace blockswap
