#pragma once

#include <cstdint>
#include <vector>

#include "plan.h"

namespace blockswap {

// One thing for the engine to do, in the order given.
struct Action {
  enum class Kind {
    kRelease,  // compute: record the piece's done event
    kOutrun,   // the next fetch's stream: wait for the piece's copy, which nobody will use
    kFetch,    // copy stream: wait for `overwritten` to be done, copy the image, record ready
    kWait,     // compute: wait for the piece's ready event
  };
  Kind kind;
  int32_t piece;
  // kFetch: the piece whose done event covers every earlier user of the range; -1 = never used.
  int32_t overwritten = -1;
};

// PURE. Decides, piece by piece, what the engine does when the model asks for a piece and when it
// is through with one. Knows the plan and what has happened, nothing of time or devices.
//
// Where the bytes of a streamed piece are:
//   absent -> fetched (copy enqueued, not used yet) -> live (the model runs it) -> spent (used; the
//   bytes are intact until a fetch overwrites them) -> absent
// Invariants: at most one piece is live; slots of pieces that are fetched or live never overlap;
// a range is overwritten only after its last user was released.
// In the planned order each piece is fetched once a step, as early as the plan allows. Any other
// order is right too: an absent piece is fetched on demand and counted as mispredicted.
class Schedule {
 public:
  // keep_spent = false: a released piece is poisoned, so its bytes never serve again.
  Schedule(const Plan& plan, bool keep_spent);

  // The model is about to run `piece` (an index into Plan::pieces, streamed).
  void acquire(int32_t piece, std::vector<Action>& actions);
  // The model is through with `piece`. Nothing happens when it is not live.
  void release(int32_t piece, std::vector<Action>& actions);
  // Fetches whatever may be fetched now: at the start, and after a change.
  void fetch_ahead(std::vector<Action>& actions);
  // The image of `piece` changed: bytes on the device are stale. Must not be live.
  void invalidate(int32_t piece);
  // The forward ended or failed: nothing stays live.
  void end(std::vector<Action>& actions);

  int32_t live() const { return live_; }
  int64_t mispredicted() const { return mispredicted_; }
  bool is_fetched(int32_t piece) const;

  // Throws UseError naming the pieces when an invariant is broken.
  void check_valid() const;

 private:
  enum class State : uint8_t { kAbsent, kFetched, kLive, kSpent };

  struct Entry {
    int32_t piece = -1;          // index into Plan::pieces
    int64_t begin = 0, end = 0;  // its slot
    int32_t after = -1;          // position whose release allows the fetch
    State state = State::kAbsent;
    bool used = true;               // no copy into its slot is under way that nobody waited for
    int64_t released_at = -1;       // count of releases, to find the latest user of a range
    std::vector<int32_t> overlaps;  // positions whose slots share bytes with this one
  };

  int32_t position_of(int32_t piece) const;
  int32_t next_of(int32_t position) const;
  // Steps forward in the cycle from `from` to `to`, in 1..size.
  int32_t distance(int32_t from, int32_t to) const;
  bool may_fetch(int32_t position) const;
  void fetch(int32_t position, std::vector<Action>& actions);
  void release_live(std::vector<Action>& actions);
  void anchor(int32_t position);

  std::vector<Entry> cycle_;        // streamed pieces in execution order
  std::vector<int32_t> positions_;  // piece -> position, -1 for residents
  bool fetches_ahead_;
  bool keep_spent_;
  int32_t live_ = -1;  // piece, not position
  int32_t last_ = -1;  // position that was released or run last
  int32_t next_ = 0;   // position to fetch next
  int64_t num_releases_ = 0;
  int64_t mispredicted_ = 0;
};

}  // namespace blockswap
