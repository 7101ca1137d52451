#include "slots.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <string>
#include <vector>

#include "cut.h"
#include "error.h"

namespace blockswap {
namespace {

// Tries where the laps begin: at each of the first pieces, balanced and full. Which border of laps
// falls into a long stretch of compute, where waiting costs nothing, only the replay can tell.
constexpr int kMaxStarts = 16;
constexpr int kReplaySteps = 8;
constexpr int kMaxFitted = 64;
constexpr int64_t kFewInRing = 16;  // pieces, on average

void select_streamed(Cycle& cycle, Plan& plan) {
  std::vector<char> resident(plan.pieces.size());
  plan.resident_bytes = plan.streamed_bytes = 0;
  for (size_t p = 0; p < plan.pieces.size(); ++p) {
    const Piece& piece = plan.pieces[p];
    resident[p] = piece.resident;
    (piece.resident ? plan.resident_bytes : plan.streamed_bytes) += piece.bytes;
  }
  cycle.select(resident);
}

void take_slots(const Cycle& cycle, Plan& plan) {
  for (Piece& piece : plan.pieces) piece.slot_offset = piece.after = -1;
  for (int i = 0; i < cycle.num_streamed(); ++i) {
    Piece& piece = plan.pieces[cycle.piece_index(i)];
    piece.slot_offset = cycle.offset(i);
    piece.after = cycle.piece_index(cycle.after(i));
  }
}

// The search does without the last fit, which takes longer than all others.
void place_for_good(Cycle& cycle, int64_t ring_bytes) {
  const Cycle::Laps laps = best_laps(cycle, ring_bytes, kMaxStarts, kReplaySteps);
  const int n = cycle.num_streamed();
  if (n > 1 && ring_bytes * n <= kFewInRing * cycle.streamed_bytes()) {
    cycle.place(ring_bytes, laps);
    const double seconds = cycle.replay(kReplaySteps);
    cycle.place(ring_bytes, {0, Cycle::Fit::kCheapest});
    if (cycle.replay(kReplaySteps) < seconds * (1.0 - 1e-6)) return;
  }
  cycle.place(ring_bytes, laps);
}

}  // namespace

Cycle::Laps best_laps(Cycle& cycle, int64_t limit_bytes, int max_starts, int replay_steps) {
  Cycle::Laps best;
  double best_seconds = std::numeric_limits<double>::infinity();
  const int n = cycle.num_streamed();
  const int starts = std::min(n, max_starts);
  for (int s = 0; s < std::max(starts, 1); ++s) {
    for (Cycle::Fit fit : {Cycle::Fit::kBalanced, Cycle::Fit::kFull, Cycle::Fit::kOldest}) {
      if (fit == Cycle::Fit::kOldest && n > kMaxFitted) continue;
      const Cycle::Laps laps{n > 0 ? s * n / std::max(starts, 1) : 0, fit};
      if (!cycle.place(limit_bytes, laps)) continue;
      const double seconds = cycle.replay(replay_steps);
      if (seconds < best_seconds * (1.0 - 1e-6)) {
        best_seconds = seconds;
        best = laps;
      }
    }
  }
  return best;
}

void assign_slots(Plan& plan, const PlanRequest& request) {
  Cycle cycle(plan.pieces, request);
  select_streamed(cycle, plan);
  if (plan.ring_bytes == 0) {
    plan.ring_bytes = request.ring_bytes > 0 ? request.ring_bytes
                      : request.budget_bytes >= 0
                          ? std::max<int64_t>(request.budget_bytes - plan.resident_bytes, 0)
                          : 2 * cycle.largest_bytes();
  }
  if (cycle.largest_bytes() > plan.ring_bytes) {
    throw ConfigError("the ring has " + format_bytes(plan.ring_bytes) +
                      " but the largest streamed piece has " + format_bytes(cycle.largest_bytes()) +
                      " (" + std::to_string(cycle.largest_bytes()) +
                      " bytes): enlarge swap_space to that, or lower block_size");
  }
  place_for_good(cycle, plan.ring_bytes);
  take_slots(cycle, plan);
  plan.copy_on_compute = request.lookahead == 0;
}

bool fill_budget(Plan& plan, const PlanRequest& request) {
  if (!request.offload_blocks.empty() || plan.streamed_bytes == 0) return false;
  const auto level = [&](int p) { return level_of(request.leaves[plan.pieces[p].first_leaf]); };
  std::vector<int> order(plan.pieces.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) {
    if (level(a) != level(b)) return level(a) > level(b);
    return plan.pieces[a].bytes > plan.pieces[b].bytes;
  });
  int32_t blocked = -1;  // a piece of this level stays out, so lower levels do too
  bool filled = false;
  for (int p : order) {
    Piece& piece = plan.pieces[p];
    if (piece.resident) continue;
    if (level(p) < blocked) break;
    const bool fits = request.budget_bytes < 0 ||
                      plan.resident_bytes + plan.ring_bytes + piece.bytes <= request.budget_bytes;
    if (!fits || plan.streamed_bytes - piece.bytes < request.offload_bytes) {
      blocked = level(p);
      continue;
    }
    piece.resident = filled = true;
    plan.resident_bytes += piece.bytes;
    plan.streamed_bytes -= piece.bytes;
  }
  if (!filled) return false;
  Cycle cycle(plan.pieces, request);
  select_streamed(cycle, plan);
  cycle.keep_slots(plan.pieces);
  take_slots(cycle, plan);
  return true;
}

}  // namespace blockswap
