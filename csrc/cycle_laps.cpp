// Where to cut the laps of a ring that holds few pieces: a border in the wrong place makes a large
// piece wait for the one right before it, in every block of the model.

#include <algorithm>
#include <limits>

#include "cycle.h"

namespace blockswap {
namespace {

constexpr int kMostInLap = 32;

}  // namespace

// The cheapest chain of laps, by dynamic programming over pairs of neighbours: which pieces a lap
// waits for depends on it and on the lap before alone. A piece's copy begins when the last user of
// its slot lets go of it and should be over when the piece is due; what is missing is the cost.
// That leaves out that the link may be busy with others, so the replay has the last word.
void Cycle::cut_laps(int64_t limit_bytes) {
  const int n = num_streamed_;
  std::vector<double> due(n), release(n);
  double time = 0.0;
  for (int i = 0; i < n; ++i) {
    due[i] = time += gap_[i];
    time += own_[i];
    release[i] = time - tail_[i];
  }
  // A lap is its first piece and how many it has.
  constexpr int kWidth = kMostInLap + 1;
  struct Chain {
    double seconds = std::numeric_limits<double>::infinity();
    int pieces_before = 0;  // of the lap before; 0: there is none
  };
  std::vector<Chain> chains(static_cast<size_t>(n) * kWidth);
  const auto chain = [&](int first, int pieces) -> Chain& {
    return chains[static_cast<size_t>(first) * kWidth + static_cast<size_t>(pieces)];
  };
  const auto fits = [&](int first, int pieces, int64_t bytes) {
    return first + pieces < n && pieces < kMostInLap &&
           bytes + bytes_[first + pieces] <= limit_bytes;
  };
  int64_t bytes = 0;
  for (int pieces = 0; fits(0, pieces, bytes);) {
    bytes += bytes_[pieces];
    chain(0, ++pieces).seconds = 0.0;
  }
  for (int before = 0; before < n; ++before) {
    for (int pieces_before = 1; pieces_before <= std::min(kMostInLap, n - before - 1);
         ++pieces_before) {
      const double seconds = chain(before, pieces_before).seconds;
      if (seconds == std::numeric_limits<double>::infinity()) continue;
      const int first = before + pieces_before;
      int user = before;
      int64_t user_end = bytes_[user];
      double late = 0.0;
      int64_t end = 0;
      for (int pieces = 0; fits(first, pieces, end);) {
        const int piece = first + pieces;
        end += bytes_[piece];
        while (user + 1 < first && user_end < end) user_end += bytes_[++user];
        late += std::max(0.0, copy_[piece] - (due[piece] - release[user] + late));
        Chain& found = chain(first, ++pieces);
        if (seconds + late < found.seconds) found = {seconds + late, pieces_before};
      }
    }
    work_ += 2 * kMostInLap;
  }
  int first = n, pieces = 0;  // of the last lap
  double best = std::numeric_limits<double>::infinity();
  for (int in_lap = 1; in_lap <= std::min(kMostInLap, n); ++in_lap) {
    if (chain(n - in_lap, in_lap).seconds < best) {
      best = chain(n - in_lap, in_lap).seconds;
      first = n - in_lap;
      pieces = in_lap;
    }
  }
  lap_first_.clear();
  while (pieces > 0) {
    lap_first_.push_back(first);
    pieces = chain(first, pieces).pieces_before;
    first -= pieces;
  }
  std::reverse(lap_first_.begin(), lap_first_.end());
}

}  // namespace blockswap
