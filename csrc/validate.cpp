#include <string>
#include <vector>

#include "cut.h"
#include "error.h"
#include "plan.h"

namespace blockswap {
namespace {

[[noreturn]] void fail(size_t piece, const std::string& text) {
  throw ConfigError("plan: piece " + std::to_string(piece) + " " + text);
}

std::string range_of(const Piece& piece) {
  return "[" + std::to_string(piece.slot_offset) + ", " +
         std::to_string(piece.slot_offset + piece.bytes) + ")";
}

void check_cover(const Plan& plan, const PlanRequest& request) {
  int32_t next = 0;
  for (size_t p = 0; p < plan.pieces.size(); ++p) {
    const Piece& piece = plan.pieces[p];
    if (piece.first_leaf != next || piece.end_leaf <= piece.first_leaf ||
        piece.end_leaf > static_cast<int32_t>(request.leaves.size())) {
      fail(p, "holds leaves [" + std::to_string(piece.first_leaf) + ", " +
                  std::to_string(piece.end_leaf) + ") where leaf " + std::to_string(next) +
                  " is next: a leaf is missing or twice");
    }
    int64_t bytes = 0;
    for (int32_t l = piece.first_leaf; l < piece.end_leaf; ++l) {
      bytes += request.leaves[l].bytes;
      if (request.leaves[l].priority == kPinned && !piece.resident) {
        fail(p, "streams the pinned leaf " + request.leaves[l].name);
      }
    }
    if (bytes != piece.bytes) {
      fail(p, "claims " + std::to_string(piece.bytes) + " bytes, its leaves have " +
                  std::to_string(bytes));
    }
    next = piece.end_leaf;
  }
  if (next != static_cast<int32_t>(request.leaves.size())) {
    throw ConfigError("plan: " + std::to_string(request.leaves.size() - next) +
                      " leaves at the end are in no piece");
  }
}

void check_bytes(const Plan& plan, const PlanRequest& request) {
  int64_t resident = 0, streamed = 0;
  for (const Piece& piece : plan.pieces) (piece.resident ? resident : streamed) += piece.bytes;
  if (resident != plan.resident_bytes || streamed != plan.streamed_bytes) {
    throw ConfigError("plan: claims " + std::to_string(plan.resident_bytes) + " resident and " +
                      std::to_string(plan.streamed_bytes) + " streamed bytes, its pieces have " +
                      std::to_string(resident) + " and " + std::to_string(streamed));
  }
  if (request.budget_bytes >= 0 && resident + plan.ring_bytes > request.budget_bytes) {
    throw ConfigError("plan: residents and ring have " +
                      std::to_string(resident + plan.ring_bytes) + " bytes, the budget is " +
                      std::to_string(request.budget_bytes));
  }
  if (streamed < request.offload_bytes) {
    throw ConfigError("plan: streams " + std::to_string(streamed) + " bytes, asked were " +
                      std::to_string(request.offload_bytes));
  }
  if (request.ring_bytes > 0 && streamed > 0 && plan.ring_bytes != request.ring_bytes) {
    throw ConfigError("plan: the ring has " + std::to_string(plan.ring_bytes) +
                      " bytes, asked were " + std::to_string(request.ring_bytes));
  }
  if (plan.copy_on_compute != (request.lookahead == 0)) {
    throw ConfigError("plan: copies belong on the compute stream when lookahead is 0, only then");
  }
}

// Between the release that a fetch waits for and the piece's own run, no other piece may need the
// range: whoever comes after `after` and before k must lie elsewhere in the ring.
void check_slots(const Plan& plan) {
  std::vector<size_t> streamed;
  std::vector<int> position(plan.pieces.size(), -1);
  for (size_t p = 0; p < plan.pieces.size(); ++p) {
    const Piece& piece = plan.pieces[p];
    if (piece.resident) {
      if (piece.slot_offset != -1 || piece.after != -1) fail(p, "is resident but has a slot");
      continue;
    }
    if (piece.slot_offset < 0 || piece.slot_offset % kAlignment != 0 ||
        piece.slot_offset + piece.bytes > plan.ring_bytes) {
      fail(p, "has the slot " + range_of(piece) + ", outside the ring of " +
                  std::to_string(plan.ring_bytes) + " bytes or not aligned");
    }
    position[p] = static_cast<int>(streamed.size());
    streamed.push_back(p);
  }
  const int n = static_cast<int>(streamed.size());
  for (int i = 0; i < n; ++i) {
    const Piece& piece = plan.pieces[streamed[i]];
    if (piece.after < 0 || piece.after >= static_cast<int32_t>(plan.pieces.size()) ||
        position[piece.after] < 0) {
      fail(streamed[i], "waits for piece " + std::to_string(piece.after) + ", which has no slot");
    }
    for (int back = 1; back <= n; ++back) {
      const size_t other = streamed[(i - back + n) % n];
      if (static_cast<int32_t>(other) == piece.after) break;
      const Piece& live = plan.pieces[other];
      if (live.slot_offset < piece.slot_offset + piece.bytes &&
          piece.slot_offset < live.slot_offset + live.bytes) {
        fail(streamed[i], "at " + range_of(piece) + " waits for piece " +
                              std::to_string(piece.after) + " only and would overwrite piece " +
                              std::to_string(other) + " at " + range_of(live) + " before it ran");
      }
    }
  }
}

void check_levels(const Plan& plan, const PlanRequest& request) {
  if (!request.offload_blocks.empty()) {
    const std::vector<char> streams = choose_blocks(request);
    for (size_t p = 0; p < plan.pieces.size(); ++p) {
      const Leaf& leaf = request.leaves[plan.pieces[p].first_leaf];
      const bool resident = leaf.priority == kPinned || !streams[leaf.block];
      if (plan.pieces[p].resident != resident) {
        fail(p, std::string("should ") + (resident ? "stay" : "stream") + " with its block " +
                    request.blocks[leaf.block].name);
      }
    }
    return;
  }
  size_t lowest = plan.pieces.size(), highest = plan.pieces.size();
  const auto level = [&](size_t p) { return level_of(request.leaves[plan.pieces[p].first_leaf]); };
  for (size_t p = 0; p < plan.pieces.size(); ++p) {
    size_t& extreme = plan.pieces[p].resident ? lowest : highest;
    const bool better =
        extreme == plan.pieces.size() ||
        (plan.pieces[p].resident ? level(p) < level(extreme) : level(p) > level(extreme));
    if (better) extreme = p;
  }
  if (lowest < plan.pieces.size() && highest < plan.pieces.size() &&
      level(lowest) < level(highest)) {
    fail(lowest, "stays although its priority is lower than that of piece " +
                     std::to_string(highest) + ", which streams");
  }
}

void check_lookahead(const Plan& plan, const PlanRequest& request) {
  if (request.lookahead <= 0 || request.leaves.empty()) return;
  std::vector<int> visit(request.leaves.size(), 0);
  for (size_t l = 1; l < visit.size(); ++l) {
    visit[l] = visit[l - 1] + (request.leaves[l].block != request.leaves[l - 1].block);
  }
  const int n = static_cast<int>(plan.pieces.size());
  const auto distance = [n](int from, int back_to) { return (from - back_to + n - 1) % n + 1; };
  for (int k = 0; k < n; ++k) {
    const Piece& piece = plan.pieces[k];
    if (piece.resident) continue;
    for (int back = 1; back < distance(k, piece.after); ++back) {
      const int other = (k - back + n) % n;
      if (plan.pieces[other].resident) continue;
      const int ended = visit[plan.pieces[other].end_leaf - 1] - (other > k ? visit.back() + 1 : 0);
      if (ended < visit[piece.first_leaf] - request.lookahead) {
        fail(k, "is fetched before piece " + std::to_string(other) + " ran, more than " +
                    std::to_string(request.lookahead) + " blocks ahead");
      }
    }
  }
}

}  // namespace

void validate(const Plan& plan, const PlanRequest& request) {
  check_cover(plan, request);
  check_slots(plan);
  check_bytes(plan, request);
  check_levels(plan, request);
  check_lookahead(plan, request);
}

}  // namespace blockswap
