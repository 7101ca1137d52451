#include "cut.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <numeric>
#include <string>

#include "error.h"

namespace blockswap {
namespace {

struct BlockCost {
  double begin = 0.0;  // compute time at which the block first runs
  double seconds = 0.0;
  int32_t level = kPinned;
  bool has_leaves = false;
};

std::vector<BlockCost> block_costs(const PlanRequest& request) {
  std::vector<BlockCost> costs(request.blocks.size());
  double now = 0.0;
  for (const Leaf& leaf : request.leaves) {
    BlockCost& cost = costs[leaf.block];
    if (!cost.has_leaves) cost.begin = now;
    cost.has_leaves = true;
    cost.seconds += leaf.seconds;
    cost.level = std::min(cost.level, level_of(leaf));
    now += leaf.seconds;
  }
  return costs;
}

// Picks `count` of `blocks` (in running order) so that their middles come as near as possible to
// the middles of `count` equal shares of the blocks' time; every block at most once.
void spread_by_time(std::vector<int32_t> blocks, int32_t count, const std::vector<BlockCost>& costs,
                    std::vector<char>& streams) {
  std::stable_sort(blocks.begin(), blocks.end(), [&](int32_t a, int32_t b) {
    if (costs[a].has_leaves != costs[b].has_leaves) return static_cast<bool>(costs[a].has_leaves);
    return costs[a].begin < costs[b].begin;
  });
  const int32_t n = static_cast<int32_t>(blocks.size());
  double total = 0.0;
  for (int32_t b : blocks) total += costs[b].seconds;
  std::vector<double> middle(n);
  double now = 0.0;
  for (int32_t i = 0; i < n; ++i) {
    middle[i] = now + costs[blocks[i]].seconds / 2;
    now += costs[blocks[i]].seconds;
  }
  int32_t next = 0;
  for (int32_t k = 0; k < count; ++k) {
    const double wanted = (k + 0.5) * total / count;
    const int32_t last = n - (count - k);  // leave enough blocks for the rest
    while (next < last && std::fabs(middle[next + 1] - wanted) < std::fabs(middle[next] - wanted)) {
      ++next;
    }
    streams[blocks[next++]] = 1;
  }
}

}  // namespace

int32_t level_of(const Leaf& leaf) {
  if (leaf.priority == kPinned) return kPinned;
  if (leaf.priority == kNoPriority) return 1;
  return leaf.priority == 0 ? 0 : leaf.priority + 1;
}

std::vector<char> choose_blocks(const PlanRequest& request) {
  if (request.offload_blocks.empty()) return {};
  std::vector<char> streams(request.blocks.size(), 0);
  const std::vector<BlockCost> costs = block_costs(request);
  std::map<std::string, std::vector<int32_t>> lists;
  for (size_t b = 0; b < request.blocks.size(); ++b) {
    lists[request.blocks[b].list].push_back(static_cast<int32_t>(b));
  }
  std::map<std::string, bool> named;
  for (const auto& [list, count] : request.offload_blocks) {
    std::vector<int32_t> members;
    if (list.empty()) {
      members.resize(request.blocks.size());
      std::iota(members.begin(), members.end(), 0);
    } else if (lists.count(list)) {
      members = lists[list];
    } else {
      std::string known;
      for (const auto& entry : lists) known += (known.empty() ? "" : ", ") + entry.first;
      throw ConfigError("offload names the block list \"" + list +
                        "\", which the model does not have: its lists are " + known);
    }
    if (named[list] || (list.empty() && request.offload_blocks.size() > 1)) {
      throw ConfigError("offload counts the blocks of \"" + (list.empty() ? "all lists" : list) +
                        "\" twice: give one count in all, or one per list");
    }
    named[list] = true;
    if (count < 0 || count > static_cast<int32_t>(members.size())) {
      throw ConfigError("offload asks for " + std::to_string(count) + " blocks of " +
                        (list.empty() ? "all lists" : "\"" + list + "\"") +
                        ": the allowed range is 0.." + std::to_string(members.size()));
    }
    std::map<int32_t, std::vector<int32_t>> by_level;
    for (int32_t b : members) by_level[costs[b].level].push_back(b);
    int32_t left = count;
    for (const auto& entry : by_level) {
      const int32_t here = std::min(left, static_cast<int32_t>(entry.second.size()));
      if (here > 0) spread_by_time(entry.second, here, costs, streams);
      left -= here;
    }
  }
  return streams;
}

std::vector<Piece> cut_pieces(const PlanRequest& request, int64_t target_bytes,
                              const std::vector<char>& block_streams) {
  std::vector<Piece> pieces;
  for (size_t l = 0; l < request.leaves.size(); ++l) {
    const Leaf& leaf = request.leaves[l];
    bool joins =
        !pieces.empty() && !leaf.cut_before && pieces.back().bytes + leaf.bytes <= target_bytes;
    if (joins) {
      const Leaf& before = request.leaves[l - 1];
      joins = level_of(before) == level_of(leaf) &&
              (block_streams.empty() || before.block == leaf.block);
    }
    if (!joins) {
      Piece piece;
      piece.first_leaf = static_cast<int32_t>(l);
      piece.resident =
          leaf.priority == kPinned || (!block_streams.empty() && !block_streams[leaf.block]);
      pieces.push_back(piece);
    }
    Piece& piece = pieces.back();
    piece.end_leaf = static_cast<int32_t>(l) + 1;
    piece.bytes += leaf.bytes;
    piece.seconds += leaf.seconds;
    piece.tail_seconds = leaf.tail_seconds;
  }
  return pieces;
}

}  // namespace blockswap
