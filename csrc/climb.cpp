// The local search: flips and swaps from good starts. See search.h.
#include <algorithm>
#include <limits>
#include <utility>

#include "search.h"

namespace blockswap {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

}  // namespace

uint32_t Search::random(uint32_t below) {
  random_state_ = random_state_ * 6364136223846793005ull + 1442695040888963407ull;
  return static_cast<uint32_t>(((random_state_ >> 32) * below) >> 32);
}

bool Search::may_flip(const std::vector<char>& resident, int piece) const {
  for (int p : movable_) {
    if (resident[piece] ? (resident[p] && level_[p] < level_[piece])
                        : (!resident[p] && level_[p] > level_[piece])) {
      return false;
    }
  }
  return true;
}

// Flips and swaps at random until `patience` of them in a row brought nothing.
void Search::climb(Choice& choice, int patience, int64_t end_work) {
  const uint32_t n = static_cast<uint32_t>(movable_.size());
  std::vector<char>& resident = choice.resident;
  int64_t streamed = 0;
  double copies = 0.0;
  for (size_t p = 0; p < pieces_.size(); ++p) {
    if (resident[p]) continue;
    streamed += pieces_[p].bytes;
    copies += copy_seconds(static_cast<int>(p));
  }
  for (int failures = 0; failures < patience && work() < end_work; ++failures) {
    cycle_.add_work(1);
    const int a = movable_[random(n)];
    int b = -1;
    if (random(4) != 0) {
      b = movable_[random(n)];
      if (resident[a] == resident[b] || level_[a] != level_[b]) continue;
    }
    int64_t bytes = streamed;
    double seconds = copies;
    for (int p : {a, b}) {
      if (p < 0) continue;
      bytes += resident[p] ? pieces_[p].bytes : -pieces_[p].bytes;
      seconds += resident[p] ? copy_seconds(p) : -copy_seconds(p);
    }
    if (!may_beat(bytes, seconds, choice.score)) continue;
    if (b < 0 && num_levels_ > 1 && !may_flip(resident, a)) continue;
    resident[a] ^= 1;
    if (b >= 0) resident[b] ^= 1;
    const double score = judge(resident, choice.ring_limit, choice.score);
    if (score < choice.score) {
      choice.score = score;
      streamed = bytes;
      copies = seconds;
      failures = -1;
    } else {
      resident[a] ^= 1;
      if (b >= 0) resident[b] ^= 1;
    }
  }
}

// Climbs from the best of the sweep, then again and again from the best set with a few pieces
// changed: a local optimum is seldom far from a better one.
void Search::improve(int64_t max_work) {
  if (movable_.size() <= kExhaustivePieces || !found() || starts_.empty()) return;
  const int64_t begin = work(), end = begin + max_work;
  const uint32_t n = static_cast<uint32_t>(movable_.size());
  const int patience = std::max(400, 12 * static_cast<int>(n));
  const auto take = [&](const Choice& choice) {
    if (choice.score < best_.score) best_ = choice;
  };
  for (size_t s = 0; s < starts_.size(); ++s) {
    climb(starts_[s], patience, begin + max_work * (s + 1) / (2 * starts_.size()));
    take(starts_[s]);
  }
  while (work() < end) {
    Choice choice = random(4) != 0 ? best_ : starts_[random(static_cast<uint32_t>(starts_.size()))];
    for (int changes = 2 + static_cast<int>(random(4)); changes > 0; --changes) {
      const int a = movable_[random(n)], b = movable_[random(n)];
      if (level_[a] == level_[b] && choice.resident[a] != choice.resident[b]) {
        std::swap(choice.resident[a], choice.resident[b]);
      } else if (num_levels_ == 1 || may_flip(choice.resident, a)) {
        choice.resident[a] = 0;
      }
    }
    choice.score = judge(choice.resident, choice.ring_limit, kInfinity);
    cycle_.add_work(n);
    if (choice.score == kInfinity) continue;
    climb(choice, patience, end);
    take(choice);
  }
}

}  // namespace blockswap
