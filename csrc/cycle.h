#pragma once

#include <cstdint>
#include <vector>

#include "host_pace.h"
#include "plan.h"

namespace blockswap {

// The streamed pieces of one step as flat arrays: what the search judges thousands of times.
// Owns scratch memory only, grown once; one caller thread. Order of calls: select, place, replay.
//
// Slots. The pieces fill the ring in cycle order, lap after lap; each lap starts at offset 0, so a
// slot is the same in every step. A short last lap would let the next lap run into pieces that
// were fetched a moment ago, so the laps are balanced: as many as a full ring needs, the largest
// as small as possible. In a ring of few pieces it matters more where they are cut.
class Cycle {
 public:
  Cycle(const std::vector<Piece>& pieces, const PlanRequest& request);

  // Streams the pieces whose flag in `resident` is 0.
  void select(const std::vector<char>& resident);

  enum class Fit {
    kBalanced,  // laps of nearly equal height
    kFull,      // laps filled up to the limit, the rest in the last one
    kOldest,    // no laps: each piece goes where the last user lies furthest back
    kCheapest,  // laps cut where that makes a piece wait least; for rings of few pieces
  };
  // How slots are given, and from which position among the streamed pieces on (kCheapest: 0).
  struct Laps {
    int start = 0;
    Fit fit = Fit::kBalanced;
  };
  // Gives slots below `limit_bytes` and finds each slot's last user. False: a piece is too large.
  bool place(int64_t limit_bytes, Laps laps);

  // Takes the slots that the selected pieces have already, and finds their last users.
  void keep_slots(const std::vector<Piece>& pieces);

  enum class Host { kMeasured, kFaster };
  // Seconds of one step after at most `max_steps` steps, every copy `slowdown` times as long.
  double replay(int max_steps, double slowdown = 1.0, Host host = Host::kMeasured);

  int num_streamed() const { return num_streamed_; }
  int64_t streamed_bytes() const { return streamed_bytes_; }
  int64_t largest_bytes() const { return largest_bytes_; }
  int64_t ring_bytes() const { return ring_bytes_; }  // end of the last slot
  double copy_seconds() const { return copy_seconds_; }
  double compute_seconds() const { return compute_seconds_; }
  double host_seconds(Host host) const { return issue_of(host).pace.step_with(num_streamed_); }
  int piece_index(int position) const { return index_[position]; }
  int64_t offset(int position) const { return offset_[position]; }
  // Position whose release the fetch waits for (its last occurrence before this position).
  int after(int position) const { return after_[position]; }
  // Pieces visited by all calls so far: the search's measure of its own work.
  int64_t work() const { return work_; }
  void add_work(int64_t visits) { work_ += visits; }

 private:
  struct Fill {
    int laps;
    int64_t largest;  // bytes of the largest lap
    int64_t next;     // the smallest capacity that would give other laps
  };
  Fill fill(int64_t capacity, int start) const;
  // The position that comes after `sequence` others from `start` on.
  int at(int sequence, int start) const {
    const int i = start + sequence;
    return i < num_streamed_ ? i : i - num_streamed_;
  }
  int64_t balanced_bytes(int64_t limit_bytes, int start) const;
  void fill_laps(int64_t capacity, int start);
  void cut_laps(int64_t limit_bytes);
  void find_last_users(int start);
  void fit_oldest(int64_t limit_bytes, int start);
  void find_overlaps();
  void limit_lookahead();

  struct Cost {
    int64_t bytes;
    double own;   // compute of the piece
    double tail;  // of which after its release
    double copy;
    int32_t first_visit;  // block visits, counted in the order in which blocks run
    int32_t last_visit;
  };
  std::vector<Cost> pieces_;
  int32_t num_visits_ = 0;
  int32_t lookahead_;
  double head_seconds_;
  double compute_seconds_ = 0.0;

  int num_streamed_ = 0;
  int64_t streamed_bytes_ = 0, largest_bytes_ = 0, ring_bytes_ = 0;
  double copy_seconds_ = 0.0, last_gap_ = 0.0;
  std::vector<int> index_, after_;
  std::vector<int64_t> bytes_, offset_;
  std::vector<double> gap_, own_, tail_, copy_, release_;
  // When, seconds from the host's begin of the step, the gap before a piece, the piece and what
  // follows the last one can be over at the earliest: see HostPace.
  struct Issue {
    HostPace pace;
    std::vector<double> gap_over, own_over;
    double last_gap_over = 0.0;
  };
  void select(const std::vector<char>& resident, Issue& issue) const;
  Issue measured_, faster_;
  const Issue& issue_of(Host host) const { return host == Host::kMeasured ? measured_ : faster_; }
  struct Range {
    int64_t end;   // it begins where the range before it ends
    int sequence;  // of its last user: position in lap order, minus num_streamed a step earlier
  };
  std::vector<Range> profile_, next_profile_;
  std::vector<int> lap_first_;
  std::vector<int64_t> lap_bytes_;
  mutable int64_t work_ = 0;
};

}  // namespace blockswap
