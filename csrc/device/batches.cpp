#include "batches.h"

#include <algorithm>

namespace blockswap {

std::vector<int64_t> Batches::cut(int64_t bytes) const {
  std::vector<int64_t> sizes;
  for (int64_t left = bytes - page_bytes_; left > 0; left -= sizes.back()) {
    sizes.push_back(std::min(left, most_bytes_));
  }
  sizes.push_back(page_bytes_);
  return sizes;
}

std::vector<PageRange> Batches::take(uint64_t address, int64_t bytes) {
  std::vector<PageRange> taken;
  const auto begin = batches_.lower_bound(address);
  const auto end = batches_.lower_bound(address + static_cast<uint64_t>(bytes));
  for (auto batch = begin; batch != end; ++batch) {
    taken.push_back({batch->first, batch->second});
  }
  batches_.erase(begin, end);
  return taken;
}

PageRange Batches::whole(uint64_t address, int64_t bytes, int64_t at_least_bytes) const {
  const uint64_t end = address + static_cast<uint64_t>(bytes);
  auto batch = batches_.lower_bound(address);
  PageRange found{batch == batches_.end() ? end : batch->first, 0};
  for (; batch != batches_.end() && found.bytes < at_least_bytes; ++batch) {
    if (batch->first + static_cast<uint64_t>(batch->second) > end) {
      break;
    }
    found.bytes += batch->second;
  }
  return found;
}

}  // namespace blockswap
