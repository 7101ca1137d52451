// The local search: flips and swaps from good starts. See search.h.
#include <algorithm>
#include <limits>
#include <utility>

#include "search.h"

namespace blockswap {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr uint32_t kFewPieces = 50;

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

// Swaps, and flips if wanted, at random until `patience` of them in a row brought nothing.
void Search::climb(Choice& choice, bool flips, int patience, int64_t end_work) {
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
    if (!flips || random(4) != 0) {
      for (int draws = 0; draws < 4 && b < 0; ++draws) {
        const int c = movable_[random(n)];
        if (resident[a] != resident[c] && level_[a] == level_[c]) b = c;
      }
      if (b < 0) continue;
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

// A few pieces change places.
void Search::change_at_random(std::vector<char>& resident) {
  const uint32_t n = static_cast<uint32_t>(movable_.size());
  for (int changes = 2 + static_cast<int>(random(4)); changes > 0; --changes) {
    const int a = movable_[random(n)], b = movable_[random(n)];
    if (level_[a] == level_[b] && resident[a] != resident[b]) {
      std::swap(resident[a], resident[b]);
    } else if (num_levels_ == 1 || may_flip(resident, a)) {
      resident[a] = 0;
    }
  }
}

// Everything streams, then pieces stay in random order while a ring of a random share is left.
void Search::stay_at_random(std::vector<char>& resident) {
  const uint32_t n = static_cast<uint32_t>(movable_.size());
  for (int p : movable_) resident[p] = 0;
  int64_t bytes = fixed_bytes_;
  const int64_t most = most_resident_bytes();
  const int64_t limit = random(2) == 0 ? most : bytes + (most - bytes) / 8 * (3 + random(5));
  for (uint32_t tries = 0; tries < 2 * n; ++tries) {
    const int p = movable_[random(n)];
    if (resident[p] || bytes + pieces_[p].bytes > limit) continue;
    if (num_levels_ > 1 && !may_flip(resident, p)) continue;
    resident[p] = 1;
    bytes += pieces_[p].bytes;
  }
}

// What may stay at most: a ring takes the smallest piece that can stream, or what was asked for.
int64_t Search::most_resident_bytes() const {
  int64_t smallest = std::numeric_limits<int64_t>::max();
  for (int p : movable_) smallest = std::min(smallest, pieces_[p].bytes);
  int64_t most = total_bytes_ - std::max<int64_t>(request_.offload_bytes, 0);
  if (request_.budget_bytes >= 0) {
    most = std::min(most, request_.budget_bytes - std::max(request_.ring_bytes, smallest));
  }
  return std::max(most, fixed_bytes_);
}

// Climbs from the best of the sweep, then again and again from the best set with a few pieces
// changed: a local optimum is seldom far from a better one.
void Search::improve(int64_t max_work) {
  if (movable_.size() <= kExhaustivePieces || !found() || starts_.empty()) return;
  const int64_t begin = work(), end = begin + max_work;
  const uint32_t n = static_cast<uint32_t>(movable_.size());
  // Enough to see most swaps of a few pieces, some of many.
  const int few = static_cast<int>(std::min<uint32_t>(n, kFewPieces));
  const int patience = std::max(few * few, 12 * static_cast<int>(n));
  const auto take = [&](const Choice& choice) {
    if (choice.score < best_.score) best_ = choice;
  };
  for (size_t s = 0; s < starts_.size(); ++s) {
    climb(starts_[s], true, patience, begin + max_work * (s + 1) / (3 * starts_.size()));
    take(starts_[s]);
  }
  while (work() < end) {
    const bool anew = random(4) == 0;
    Choice choice = random(4) != 0 ? best_ : starts_[random(static_cast<uint32_t>(starts_.size()))];
    if (anew) {
      stay_at_random(choice.resident);
    } else {
      change_at_random(choice.resident);
    }
    choice.score = judge(choice.resident, choice.ring_limit, kInfinity);
    cycle_.add_work(n);
    if (choice.score == kInfinity) continue;
    // A flip soon leads back to the ring of the best: a new set is first sorted out as it is.
    if (anew) climb(choice, false, patience, end);
    climb(choice, true, patience, end);
    take(choice);
  }
}

}  // namespace blockswap
