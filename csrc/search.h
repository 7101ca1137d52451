#pragma once

#include <cstdint>
#include <limits>
#include <vector>

#include "cycle.h"
#include "plan.h"

namespace blockswap {

// Chooses which pieces stay, for one way of cutting. The ring takes what the budget leaves beside
// the residents, so the set of residents is the only unknown: a larger ring never hurts, and the
// search trades ring for residents by flipping pieces.
//
// sweep() tries residents even by time for many ring sizes; exhaust() tries all sets of a few
// pieces; improve() flips and swaps. All work is counted in pieces visited, never in seconds, so
// the same request gives the same plan on any machine.
class Search {
 public:
  // Owns its pieces: searches are sorted, and a reference would follow the vector's old place.
  Search(std::vector<Piece> pieces, const PlanRequest& request);

  void sweep();
  void improve(int64_t max_work);

  bool found() const { return best_.score < std::numeric_limits<double>::infinity(); }
  double score() const { return best_.score; }
  const std::vector<Piece>& pieces() const { return pieces_; }
  const std::vector<char>& resident() const { return best_.resident; }
  int64_t ring_limit() const { return best_.ring_limit; }
  int64_t work() const { return cycle_.work(); }
  int64_t replays() const { return replays_; }

 private:
  static constexpr size_t kExhaustivePieces = 14;

  struct Choice {
    std::vector<char> resident;
    int64_t ring_limit = 0;
    double score = std::numeric_limits<double>::infinity();
  };

  double judge(const std::vector<char>& resident, int64_t ring_limit, double threshold);
  void consider(const std::vector<char>& resident, int64_t ring_limit);
  bool spread(int64_t ring, int64_t stream_bytes, double threshold, std::vector<char>& resident);
  void stream_idle_first(int64_t stream_bytes, int64_t ring, std::vector<char>& resident);
  void exhaust(const std::vector<int64_t>& ring_limits);
  void climb(Choice& choice, bool flips, int patience, int64_t end_work);
  void change_at_random(std::vector<char>& resident);
  void stay_at_random(std::vector<char>& resident);
  int64_t most_resident_bytes() const;
  bool may_beat(int64_t streamed_bytes, double copy_seconds, double threshold) const;
  double copy_seconds(int piece) const {
    return static_cast<double>(pieces_[piece].bytes) / request_.link.bytes_per_second +
           request_.link.seconds_per_copy;
  }
  // What streams is asked for, not forced by the budget: the ring's size is then a free choice.
  bool ring_is_free() const { return request_.budget_bytes < 0 || request_.offload_bytes > 0; }
  bool may_flip(const std::vector<char>& resident, int piece) const;
  uint32_t random(uint32_t below);

  const std::vector<Piece> pieces_;
  const PlanRequest& request_;
  Cycle cycle_;
  std::vector<int> movable_;  // pieces that are not settled by pins or by chosen blocks
  std::vector<int> level_;    // per piece, dense from 0; -1 when settled
  int num_levels_ = 0;
  int64_t total_bytes_ = 0;
  int64_t fixed_bytes_ = 0;  // residents that are settled
  int64_t movable_bytes_ = 0;
  bool host_matters_ = false;  // then plans are judged under a faster host, too
  double floor_seconds_ = 0.0, faster_floor_seconds_ = 0.0;
  std::vector<Choice> starts_;  // the best of the sweep, best first
  Choice best_;
  uint64_t random_state_ = 0x9e3779b97f4a7c15ull;
  int64_t replays_ = 0;
};

}  // namespace blockswap
