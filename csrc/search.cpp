#include "search.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <utility>

#include "cut.h"
#include "slots.h"

namespace blockswap {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr int kReplaySteps = 4;
constexpr int kTriedStarts = 6;
constexpr size_t kKeptStarts = 4;
constexpr int kFewStreamed = 12, kSomeStreamed = 24;
constexpr int kBisections = 16;
constexpr double kFewNear = 1.2, kSomeNear = 1.03;
// Among plans of nearly equal speed the one that leaves the link free wins, then the smaller ring.
constexpr double kCopyWeight = 1e-3;
// A little of what the step would lose on a link 5 % slower: of two plans that just hide their
// copies behind compute, the one with room to spare is worth more on a real machine.
constexpr double kSlowLink = 1.05;
constexpr double kSlowLinkWeight = 0.1;
// Where the host sets the pace, a plan counts half for the measured host and half for a faster one.
// A host is seldom as slow again as it was measured, and a plan for too slow a host streams more
// bytes in larger pieces and stalls a faster one (SDXL at half kept: 77 ms for 60).
constexpr double kHostMatters = 0.7;  // of the compute time
constexpr double kRingWeight = 1e-5;
// Without a budget the ring is worth something all the same: offloading is asked for to save it.
constexpr double kUnboundedRingWeight = 0.005;

}  // namespace

Search::Search(std::vector<Piece> pieces, const PlanRequest& request)
    : pieces_(std::move(pieces)), request_(request), cycle_(pieces_, request) {
  std::map<int32_t, int> dense;
  for (const Piece& piece : pieces_) {
    if (!piece.resident && request.offload_blocks.empty()) {
      dense[level_of(request.leaves[piece.first_leaf])] = 0;
    }
  }
  for (auto& entry : dense) entry.second = num_levels_++;
  level_.assign(pieces_.size(), -1);
  for (size_t p = 0; p < pieces_.size(); ++p) {
    const Piece& piece = pieces_[p];
    total_bytes_ += piece.bytes;
    if (piece.resident) fixed_bytes_ += piece.bytes;
    if (piece.resident || !request.offload_blocks.empty()) continue;
    level_[p] = dense[level_of(request.leaves[piece.first_leaf])];
    movable_.push_back(static_cast<int>(p));
    movable_bytes_ += piece.bytes;
  }
  const double compute = cycle_.compute_seconds();
  const double host = cycle_.host_seconds(Cycle::Host::kMeasured);
  host_matters_ = host > kHostMatters * compute;
  floor_seconds_ = std::max(compute, host);
  if (host_matters_) {
    faster_floor_seconds_ = std::max(compute, cycle_.host_seconds(Cycle::Host::kFaster));
    floor_seconds_ = (floor_seconds_ + faster_floor_seconds_) / 2;
  }
}

double Search::judge(const std::vector<char>& resident, int64_t ring_limit, double threshold) {
  cycle_.select(resident);
  const double base = kCopyWeight * cycle_.copy_seconds();
  if (!may_beat(cycle_.streamed_bytes(), cycle_.copy_seconds(), threshold)) return kInfinity;
  int64_t limit = ring_limit;
  if (request_.budget_bytes >= 0) {
    const int64_t left = request_.budget_bytes - (total_bytes_ - cycle_.streamed_bytes());
    if (request_.ring_bytes > 0 && cycle_.num_streamed() > 0 && left < limit) return kInfinity;
    limit = std::min(limit, left);
  }
  if (cycle_.largest_bytes() > limit) return kInfinity;
  ++replays_;
  const double weight = ring_is_free() ? kUnboundedRingWeight : kRingWeight;
  const auto score = [&] {
    double seconds = cycle_.replay(kReplaySteps);
    const double rest =
        base + weight * static_cast<double>(cycle_.ring_bytes()) / request_.link.bytes_per_second;
    const double least =
        host_matters_ ? (seconds + std::max(faster_floor_seconds_, cycle_.copy_seconds())) / 2
                      : seconds;
    if (least + rest >= threshold) return least + rest;
    const double slow = cycle_.replay(kReplaySteps, kSlowLink);
    const double margin = kSlowLinkWeight * (slow - seconds);
    if (host_matters_) {
      seconds = (seconds + cycle_.replay(kReplaySteps, 1.0, Cycle::Host::kFaster)) / 2;
    }
    return seconds + rest + margin;
  };
  cycle_.place(limit, {});
  double best = score();
  // The fewer and larger the slots, the more it matters how exactly they lie.
  const int streamed = cycle_.num_streamed();
  const double near = streamed <= kFewStreamed    ? kFewNear
                      : streamed <= kSomeStreamed ? kSomeNear
                                                  : 0.0;
  if (best >= threshold && best < threshold * near) {
    cycle_.place(limit, best_laps(cycle_, limit, kTriedStarts, kReplaySteps));
    best = std::min(best, score());
  }
  return best;
}

// Whether a set with these sums can score below the threshold: a bound that costs nothing.
bool Search::may_beat(int64_t streamed_bytes, double copy_seconds, double threshold) const {
  if (streamed_bytes < request_.offload_bytes) return false;
  if (request_.budget_bytes >= 0 && total_bytes_ - streamed_bytes > request_.budget_bytes) {
    return false;
  }
  return std::max(floor_seconds_, copy_seconds) + kCopyWeight * copy_seconds < threshold;
}

void Search::consider(const std::vector<char>& resident, int64_t ring_limit) {
  const double worst = starts_.size() < kKeptStarts ? kInfinity : starts_.back().score;
  const double score = judge(resident, ring_limit, worst);
  if (score >= worst) return;
  for (const Choice& start : starts_) {
    if (start.resident == resident && start.ring_limit == ring_limit) return;
  }
  if (starts_.size() == kKeptStarts) starts_.pop_back();
  const auto place = std::upper_bound(starts_.begin(), starts_.end(), score,
                                      [](double s, const Choice& c) { return s < c.score; });
  starts_.insert(place, {resident, ring_limit, score});
  if (score < best_.score) best_ = starts_.front();
}

// Residents so that streamed bytes are even over compute time: a piece streams once the link has
// earned a share of its bytes. A full ring cannot bank more than its size. The rate is bisected
// until at least stream_bytes stream. Lower levels stream whole first.
bool Search::spread(int64_t ring, int64_t stream_bytes, double threshold,
                    std::vector<char>& resident) {
  std::vector<int64_t> level_bytes(num_levels_, 0);
  for (int p : movable_) level_bytes[level_[p]] += pieces_[p].bytes;
  int critical = 0;
  int64_t below = 0;
  while (critical < num_levels_ && below + level_bytes[critical] < stream_bytes) {
    below += level_bytes[critical++];
  }
  for (int p : movable_) {
    if (pieces_[p].bytes > ring && level_[p] < critical) return false;
  }
  double time = 0.0;
  for (const Piece& piece : pieces_) time += piece.seconds;
  const double bank = static_cast<double>(ring);
  const double all = static_cast<double>(movable_bytes_);
  const double head = request_.head_seconds;
  const double per_byte = time > 0.0 ? 0.0 : 1.0;  // no costs known: even over bytes
  if (time <= 0.0) time = static_cast<double>(total_bytes_);
  double low = 0.0, high = 6.0 * all / time;
  std::vector<char> tried(pieces_.size());
  bool found = false;
  for (int round = 0; round < kBisections; ++round) {
    const double rate = (low + high) / 2;
    double credit = std::min(rate * head, bank);
    int64_t streamed = 0;
    cycle_.add_work(static_cast<int64_t>(pieces_.size()) / 2);
    for (size_t p = 0; p < pieces_.size(); ++p) {
      const Piece& piece = pieces_[p];
      const double bytes = static_cast<double>(piece.bytes);
      credit = std::min(credit + rate * (piece.seconds + per_byte * bytes), bank);
      if (level_[p] < 0 || level_[p] > critical || piece.bytes > ring) {
        tried[p] = 1;
      } else if (level_[p] < critical || credit >= bytes * threshold) {
        tried[p] = 0;
        credit -= bytes;
        streamed += piece.bytes;
      } else {
        tried[p] = 1;
      }
    }
    if (streamed >= stream_bytes) {
      resident = tried;
      found = true;
      high = rate;
      if (streamed == stream_bytes) break;
    } else {
      low = rate;
    }
  }
  return found;
}

// Streams what computes least per byte: the best where the ring is too small to overlap anything.
void Search::stream_idle_first(int64_t stream_bytes, int64_t ring, std::vector<char>& resident) {
  std::vector<int> order = movable_;
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) {
    if (level_[a] != level_[b]) return level_[a] < level_[b];
    return pieces_[a].seconds * static_cast<double>(pieces_[b].bytes) <
           pieces_[b].seconds * static_cast<double>(pieces_[a].bytes);
  });
  cycle_.add_work(static_cast<int64_t>(order.size()));
  for (size_t p = 0; p < pieces_.size(); ++p) resident[p] = pieces_[p].resident;
  for (int p : movable_) resident[p] = 1;
  for (int p : order) {
    if (stream_bytes <= 0) break;
    if (pieces_[p].bytes > ring && num_levels_ > 1) break;  // a higher level must not go before it
    if (pieces_[p].bytes > ring) continue;
    resident[p] = 0;
    stream_bytes -= pieces_[p].bytes;
  }
}

void Search::sweep() {
  std::vector<char> resident(pieces_.size());
  for (size_t p = 0; p < pieces_.size(); ++p) resident[p] = pieces_[p].resident;
  std::vector<char> all = resident;
  for (int p : movable_) all[p] = 1;
  int64_t largest = 0, smallest = std::numeric_limits<int64_t>::max();
  for (size_t p = 0; p < pieces_.size(); ++p) {
    if (resident[p]) continue;
    largest = std::max(largest, pieces_[p].bytes);
    smallest = std::min(smallest, pieces_[p].bytes);
  }
  const int64_t unlimited =
      request_.ring_bytes > 0 ? request_.ring_bytes : std::numeric_limits<int64_t>::max();
  if (largest == 0 || !movable_.empty()) consider(all, unlimited);
  if (found()) return;  // everything fits

  std::vector<int64_t> rings;
  if (request_.ring_bytes > 0) {
    rings.push_back(request_.ring_bytes);
  } else {
    const int64_t streamable = movable_.empty() ? 4 * largest : movable_bytes_;
    int64_t high = std::max(largest, streamable / (ring_is_free() ? 4 : 2));
    if (request_.budget_bytes >= 0) high = std::min(high, request_.budget_bytes - fixed_bytes_);
    if (!movable_.empty()) {
      for (int64_t r : {largest / 4, largest / 2, largest * 3 / 4}) {
        if (r >= smallest) rings.push_back(r);
      }
    }
    const double factor =
        std::max(1.15, std::pow(static_cast<double>(high) / static_cast<double>(largest), 1 / 20.));
    for (double r = static_cast<double>(largest); r < static_cast<double>(high); r *= factor) {
      rings.push_back(static_cast<int64_t>(r));
    }
    rings.push_back(high);
  }
  if (movable_.empty()) {
    for (int64_t ring : rings) consider(resident, ring);
    return;
  }
  if (movable_.size() <= kExhaustivePieces) {
    exhaust(ring_is_free() ? rings : std::vector<int64_t>{unlimited});
    return;
  }
  Choice idle_first;
  for (int64_t ring : rings) {
    int64_t stream = std::max<int64_t>(request_.offload_bytes, 0);
    if (request_.budget_bytes >= 0) {
      stream = std::max(stream, total_bytes_ - (request_.budget_bytes - ring));
    }
    const int64_t limit = ring_is_free() ? ring : unlimited;
    for (double threshold : {0.2, 0.5, 0.8}) {
      if (spread(ring, std::min(stream, movable_bytes_), threshold, resident)) {
        consider(resident, limit);
      }
    }
    stream_idle_first(std::min(stream, movable_bytes_), ring, resident);
    const double score = judge(resident, limit, idle_first.score);
    if (score < idle_first.score) idle_first = {resident, limit, score};
  }
  for (int p : movable_) resident[p] = 0;
  consider(resident, rings.back());
  // Kept even when it is worse: it lies in another valley than the even ones.
  if (idle_first.score < kInfinity) starts_.push_back(idle_first);
  if (idle_first.score < best_.score) best_ = idle_first;
}

void Search::exhaust(const std::vector<int64_t>& ring_limits) {
  std::vector<char> resident(pieces_.size(), 1);
  for (uint32_t mask = 0; mask < (1u << movable_.size()); ++mask) {
    int highest_streamed = -1, lowest_resident = num_levels_;
    for (size_t m = 0; m < movable_.size(); ++m) {
      const bool stays = (mask >> m) & 1;
      const int p = movable_[m];
      resident[p] = stays;
      if (stays) lowest_resident = std::min(lowest_resident, level_[p]);
      if (!stays) highest_streamed = std::max(highest_streamed, level_[p]);
    }
    if (highest_streamed > lowest_resident) continue;
    for (int64_t limit : ring_limits) {
      const double score = judge(resident, limit, best_.score);
      if (score < best_.score) best_ = {resident, limit, score};
    }
  }
}

}  // namespace blockswap
