#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace blockswap {

// Every image, and every tensor in an image, starts at a multiple of this: cuBLAS chooses its
// algorithm by alignment, so this belongs to bit-identity.
constexpr int64_t kAlignment = 256;

constexpr int32_t kPinned = INT32_MAX;  // a leaf's priority: always resident
constexpr int32_t kNoPriority = -1;     // a leaf's priority: the planner decides

// One leaf module (or a module that cannot be cut) in the order in which the model runs it.
struct Leaf {
  std::string name;
  int64_t bytes = 0;     // of its image: multiple of kAlignment
  double seconds = 0.0;  // compute from the start of this leaf to the start of the next one
  // The end of `seconds` that follows the leaf's own forward (attention behind to_v, an activation
  // behind a projection): its bytes may be overwritten by then.
  double tail_seconds = 0.0;
  double host_seconds = 0.0;       // the host's time to issue that; 0 = never in the way
  int32_t block = 0;               // index into PlanRequest::blocks
  int32_t priority = kNoPriority;  // kPinned, or 0 = first to stream, larger = kept longer
  // Its image does not lie right behind the one before: no piece holds both, so that each piece is
  // one copy.
  bool cut_before = false;
};

struct Block {
  std::string name;  // "transformer_blocks.3"
  std::string list;  // "transformer_blocks"
};

struct Link {
  double bytes_per_second = 0.0;
  double seconds_per_copy = 8e-6;  // fixed cost of one copy
};

// What the planner is asked. Sizes in bytes; 0 or -1 mean "the planner decides" where stated.
struct PlanRequest {
  std::vector<Leaf> leaves;
  std::vector<Block> blocks;
  Link link;
  double head_seconds = 0.0;           // compute before the first leaf starts
  double host_seconds = 0.0;           // the host's time to issue what precedes the first leaf
  double host_seconds_per_copy = 0.0;  // its time for one streamed piece, beside the leaves'
  int64_t budget_bytes = -1;           // residents + ring may not pass this; -1 = no bound
  int64_t offload_bytes = -1;          // at least this many weight bytes stream; -1 = as few as fit
  // Exactly this many blocks of a list ("" = of all lists together) stream whole, all other
  // blocks stay whole on the device. Empty = decided piece by piece.
  std::vector<std::pair<std::string, int32_t>> offload_blocks;
  int64_t ring_bytes = 0;   // exact size of the ring; 0 = searched
  int64_t piece_bytes = 0;  // target size of a piece; 0 = searched; 1 = every leaf alone
  int32_t lookahead = -1;   // fetch at most this many blocks ahead of the running one;
                            // 0 = copy on the compute stream; -1 = as far as the ring allows
};

// The tensors that move together: leaves [first_leaf, end_leaf) of the request.
struct Piece {
  int32_t first_leaf = 0;
  int32_t end_leaf = 0;
  int64_t bytes = 0;
  double seconds = 0.0;       // compute from its first leaf to the next piece's first leaf
  double tail_seconds = 0.0;  // its last leaf's: the piece is released before that
  bool resident = false;
  int64_t slot_offset = -1;  // byte offset in the ring; -1 for residents
  // Its fetch may be enqueued once this piece was released (index into Plan::pieces), in the same
  // step if after < its own index, else in the step before. The last user of its range, or the
  // piece that the lookahead waits for. It may be the piece itself (a ring of one slot).
  // -1 for residents.
  int32_t after = -1;
};

struct Plan {
  std::vector<Piece> pieces;  // in execution order; they cover all leaves
  int64_t ring_bytes = 0;     // slots lie in [0, ring_bytes)
  int64_t resident_bytes = 0;
  int64_t streamed_bytes = 0;
  int64_t piece_bytes = 0;         // the target that was used
  bool copy_on_compute = false;    // lookahead 0
  double compute_seconds = 0.0;    // head + all leaves
  double host_seconds = 0.0;       // to issue all of it, copies included
  double predicted_seconds = 0.0;  // a step in steady state, by simulation
  double bound_seconds = 0.0;  // max(compute, host, streamed bytes / link): no schedule is faster
  int64_t search_visits = 0;   // pieces that the search visited: its work, counted, not timed
  std::string reason;          // one or two sentences: what limits the step
};

// The best plan that the search finds (design: residents even by time, searched piece and ring
// sizes, judged by simulation, improved by local search). PURE: no clock, no device, deterministic.
// Throws CapError when the smallest plan passes the budget, naming the smallest possible budget,
// and ConfigError when two wishes contradict each other (a ring below the largest streamed piece
// names that minimum).
Plan make_plan(const PlanRequest& request);

// What the plan costs under the request, whose times may be newer: everything from compute_seconds
// to reason, and each piece's seconds.
void predict(Plan& plan, const PlanRequest& request);

// Gives slots and fetch dependencies to pieces whose residency is settled.
void assign_slots(Plan& plan, const PlanRequest& request);

// Throws ConfigError naming piece and range when the plan is wrong: a leaf missing or twice, a slot
// outside the ring, live ranges that overlap, a fetch that would overwrite a piece not yet run.
void validate(const Plan& plan, const PlanRequest& request);

// A table for people: residents and streamed bytes per block, ring, prediction, bound, reason.
std::string explain(const Plan& plan, const PlanRequest& request);

}  // namespace blockswap
