#include "cycle.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace blockswap {
namespace {

// Of the measured time: plans are judged with such a host, too (search.cpp).
constexpr double kFasterHost = 0.7;

}  // namespace

Cycle::Cycle(const std::vector<Piece>& pieces, const PlanRequest& request)
    : lookahead_(request.lookahead),
      head_seconds_(request.head_seconds),
      measured_{host_pace(pieces, request), {}, {}},
      faster_{host_pace(pieces, request, kFasterHost), {}, {}} {
  const Link& link = request.link;
  pieces_.reserve(pieces.size());
  std::vector<int32_t> visit(request.leaves.size(), 0);
  for (size_t i = 1; i < visit.size(); ++i) {
    visit[i] = visit[i - 1] + (request.leaves[i].block != request.leaves[i - 1].block ? 1 : 0);
  }
  num_visits_ = visit.empty() ? 0 : visit.back() + 1;
  compute_seconds_ = head_seconds_;
  for (const Piece& piece : pieces) {
    pieces_.push_back(
        {piece.bytes, piece.seconds, piece.tail_seconds,
         static_cast<double>(piece.bytes) / link.bytes_per_second + link.seconds_per_copy,
         visit[piece.first_leaf], visit[piece.end_leaf - 1]});
    compute_seconds_ += piece.seconds;
  }
  const size_t n = pieces.size();
  for (auto* v : {&index_, &after_}) v->resize(n);
  for (auto* v : {&bytes_, &offset_}) v->resize(n);
  for (auto* v : {&gap_, &own_, &tail_, &copy_, &release_}) v->resize(n);
  for (Issue* issue : {&measured_, &faster_}) {
    issue->gap_over.resize(n);
    issue->own_over.resize(n);
  }
  profile_.reserve(2 * n);
  next_profile_.reserve(2 * n);
  lap_first_.reserve(n);
  lap_bytes_.reserve(n);
}

void Cycle::select(const std::vector<char>& resident) {
  num_streamed_ = 0;
  streamed_bytes_ = largest_bytes_ = ring_bytes_ = 0;
  copy_seconds_ = 0.0;
  double gap = head_seconds_;
  for (size_t p = 0; p < pieces_.size(); ++p) {
    const Cost& piece = pieces_[p];
    if (resident[p]) {
      gap += piece.own;
      continue;
    }
    const int i = num_streamed_++;
    index_[i] = static_cast<int>(p);
    bytes_[i] = piece.bytes;
    gap_[i] = gap;
    own_[i] = piece.own;
    tail_[i] = piece.tail;
    copy_[i] = piece.copy;
    streamed_bytes_ += piece.bytes;
    largest_bytes_ = std::max(largest_bytes_, piece.bytes);
    copy_seconds_ += piece.copy;
    gap = 0.0;
  }
  last_gap_ = gap;
  for (Issue* issue : {&measured_, &faster_}) select(resident, *issue);
  work_ += static_cast<int64_t>(pieces_.size()) / 2 + 20;
}

Cycle::Fill Cycle::fill(int64_t capacity, int start) const {
  Fill result{1, 0, std::numeric_limits<int64_t>::max()};
  int64_t lap = 0;
  const auto add = [&](int begin, int end) {
    for (int i = begin; i < end; ++i) {
      const int64_t bytes = bytes_[i];
      if (lap + bytes > capacity) {
        result.next = std::min(result.next, lap + bytes);
        result.largest = std::max(result.largest, lap);
        ++result.laps;
        lap = bytes;
      } else {
        lap += bytes;
      }
    }
  };
  add(start, num_streamed_);
  add(0, start);
  result.largest = std::max(result.largest, lap);
  work_ += num_streamed_ / 2;
  return result;
}

bool Cycle::place(int64_t limit_bytes, Laps laps) {
  if (largest_bytes_ > limit_bytes) return false;
  if (num_streamed_ == 0) return true;
  if (lookahead_ == 0) {  // nothing is fetched ahead: every piece uses the same bytes
    for (int i = 0; i < num_streamed_; ++i) {
      offset_[i] = 0;
      after_[i] = i > 0 ? i - 1 : num_streamed_ - 1;
    }
    ring_bytes_ = largest_bytes_;
    return true;
  }
  if (laps.fit == Fit::kOldest) {
    fit_oldest(limit_bytes, laps.start);
    find_overlaps();
  } else {
    if (laps.fit == Fit::kCheapest) {
      cut_laps(limit_bytes);
    } else {
      const bool balanced = laps.fit == Fit::kBalanced;
      fill_laps(balanced ? balanced_bytes(limit_bytes, laps.start) : limit_bytes, laps.start);
    }
    find_last_users(laps.start);
  }
  if (lookahead_ > 0) limit_lookahead();
  return true;
}

// The height of the largest lap where laps are nearly equal.
int64_t Cycle::balanced_bytes(int64_t limit_bytes, int start) const {
  const Fill full = fill(limit_bytes, start);
  int64_t low = std::max(largest_bytes_, (streamed_bytes_ + full.laps - 1) / full.laps);
  int64_t capacity = full.largest;
  // A few bisections: the last per cent of a lap is worth less than its cost here.
  for (int round = 0; low < capacity && (num_streamed_ <= 64 || round < 6); ++round) {
    const Fill tried = fill(low + (capacity - low) / 2, start);
    if (tried.laps <= full.laps) {
      capacity = tried.largest;
    } else {
      low = tried.next;
    }
  }
  return capacity;
}

// Laps as full as they get.
void Cycle::fill_laps(int64_t capacity, int start) {
  lap_first_.clear();
  int64_t lap = capacity;  // so that the first piece opens a lap
  for (int q = 0; q < num_streamed_; ++q) {
    const int64_t bytes = bytes_[at(q, start)];
    if (lap + bytes > capacity || q == 0) {
      lap_first_.push_back(q);
      lap = 0;
    }
    lap += bytes;
  }
}

// Slots lap by lap. `profile_` holds the ring from offset 0 on as ranges with their last users; a
// lap reads it and overwrites its front.
void Cycle::find_last_users(int start) {
  const int n = num_streamed_;
  const auto position = [&](int sequence) {
    return at(sequence < 0 ? sequence + n : sequence, start);
  };
  const int num_laps = static_cast<int>(lap_first_.size());
  const auto lap_end = [&](int l) { return l + 1 < num_laps ? lap_first_[l + 1] : n; };
  lap_bytes_.clear();
  for (int l = 0; l < num_laps; ++l) {
    int64_t lap = 0;
    for (int q = lap_first_[l]; q < lap_end(l); ++q) {
      offset_[position(q)] = lap;
      lap += bytes_[position(q)];
    }
    lap_bytes_.push_back(lap);
  }

  // The ring as the step before left it: the last lap, and what longer laps before it left beyond.
  profile_.clear();
  int64_t covered = 0;
  for (int l = num_laps - 1; l >= 0; --l) {
    if (lap_bytes_[l] <= covered) continue;
    for (int q = lap_first_[l]; q < lap_end(l); ++q) {
      const int64_t end = offset_[position(q)] + bytes_[position(q)];
      if (end > covered) profile_.push_back({end, q - n});
    }
    covered = lap_bytes_[l];
  }
  ring_bytes_ = covered;

  for (int l = 0; l < num_laps; ++l) {
    next_profile_.clear();
    size_t cursor = 0;
    for (int q = lap_first_[l]; q < lap_end(l); ++q) {
      const int i = position(q);
      const int64_t begin = offset_[i];
      const int64_t end = begin + bytes_[i];
      while (profile_[cursor].end <= begin) ++cursor;
      int last = q - n;
      for (size_t c = cursor; c < profile_.size(); ++c) {
        last = std::max(last, profile_[c].sequence);
        if (profile_[c].end >= end) break;
      }
      after_[i] = position(last);
      next_profile_.push_back({end, q});
    }
    while (cursor < profile_.size() && profile_[cursor].end <= lap_bytes_[l]) ++cursor;
    next_profile_.insert(next_profile_.end(), profile_.begin() + cursor, profile_.end());
    profile_.swap(next_profile_);
  }
  work_ += n;
}

void Cycle::keep_slots(const std::vector<Piece>& pieces) {
  for (int i = 0; i < num_streamed_; ++i) offset_[i] = pieces[index_[i]].slot_offset;
  find_overlaps();
  if (lookahead_ > 0) limit_lookahead();
}

// Last users of slots that lie anyhow.
void Cycle::find_overlaps() {
  const int n = num_streamed_;
  ring_bytes_ = 0;
  for (int i = 0; i < n; ++i) {
    ring_bytes_ = std::max(ring_bytes_, offset_[i] + bytes_[i]);
    int last = i;
    do {
      last = last > 0 ? last - 1 : n - 1;
    } while (
        lookahead_ != 0 && last != i &&
        (offset_[last] >= offset_[i] + bytes_[i] || offset_[i] >= offset_[last] + bytes_[last]));
    after_[i] = last;
  }
  work_ += n;
}

// Each piece goes where the ranges that it overwrites were last used longest ago; of equally old
// places it takes the lowest. `profile_` holds the ring from offset 0 on, as for laps.
void Cycle::fit_oldest(int64_t limit_bytes, int start) {
  const int n = num_streamed_;
  profile_.assign(1, {limit_bytes, -1});
  for (int q = 0; q < n; ++q) {
    const int i = start + q < n ? start + q : start + q - n;
    int64_t best = 0, begin = 0;
    int best_last = n;
    for (size_t c = 0; c < profile_.size(); begin = profile_[c++].end) {
      if (begin + bytes_[i] > limit_bytes) break;
      int last = -1;
      for (size_t d = c; d < profile_.size(); ++d) {
        last = std::max(last, profile_[d].sequence);
        if (profile_[d].end >= begin + bytes_[i]) break;
      }
      if (last < best_last) {
        best_last = last;
        best = begin;
      }
    }
    offset_[i] = best;
    const int64_t end = best + bytes_[i];
    next_profile_.clear();
    bool placed = false;
    for (const Range& range : profile_) {
      if (range.end <= best) {
        next_profile_.push_back(range);
        continue;
      }
      if (!placed) {
        // The range in which the slot begins keeps its front.
        const int64_t front = next_profile_.empty() ? 0 : next_profile_.back().end;
        if (front < best) next_profile_.push_back({best, range.sequence});
        next_profile_.push_back({end, q});
        placed = true;
      }
      if (range.end > end) next_profile_.push_back(range);
    }
    profile_.swap(next_profile_);
  }
}

// Piece i waits at least for the last streamed piece that lies wholly before the block visit
// first_visit(i) - lookahead. Visits of the step before count num_visits less.
void Cycle::limit_lookahead() {
  const int n = num_streamed_;
  int sequence = -n;  // of the piece waited for; grows with i, since visits grow
  const auto last_visit = [&](int s) {
    return s < 0 ? pieces_[index_[s + n]].last_visit - num_visits_ : pieces_[index_[s]].last_visit;
  };
  for (int i = 0; i < n; ++i) {
    const int32_t from = pieces_[index_[i]].first_visit - lookahead_;
    sequence = std::max(sequence, i - n);
    while (sequence + 1 < i && last_visit(sequence + 1) < from) ++sequence;
    const int slot = after_[i] < i ? after_[i] : after_[i] - n;
    const int last = std::max(slot, last_visit(sequence) < from ? sequence : i - n);
    after_[i] = last < 0 ? last + n : last;
  }
}

}  // namespace blockswap
