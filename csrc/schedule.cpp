#include "schedule.h"

#include <string>

#include "error.h"

namespace blockswap {

Schedule::Schedule(const Plan& plan, bool keep_spent)
    : positions_(plan.pieces.size(), -1),
      fetches_ahead_(!plan.copy_on_compute),
      keep_spent_(keep_spent) {
  for (size_t i = 0; i < plan.pieces.size(); ++i) {
    const Piece& piece = plan.pieces[i];
    if (!piece.resident) {
      positions_[i] = static_cast<int32_t>(cycle_.size());
      Entry entry;
      entry.piece = static_cast<int32_t>(i);
      entry.begin = piece.slot_offset;
      entry.end = piece.slot_offset + piece.bytes;
      cycle_.push_back(std::move(entry));
    }
  }
  for (Entry& entry : cycle_) {
    const int32_t after = plan.pieces[static_cast<size_t>(entry.piece)].after;
    entry.after = after < 0 ? -1 : positions_[static_cast<size_t>(after)];
  }
  for (size_t a = 0; a < cycle_.size(); ++a) {
    for (size_t b = a + 1; b < cycle_.size(); ++b) {
      if (cycle_[a].begin < cycle_[b].end && cycle_[b].begin < cycle_[a].end) {
        cycle_[a].overlaps.push_back(static_cast<int32_t>(b));
        cycle_[b].overlaps.push_back(static_cast<int32_t>(a));
      }
    }
  }
  last_ = static_cast<int32_t>(cycle_.size()) - 1;  // as if a step had just ended
}

int32_t Schedule::position_of(int32_t piece) const {
  if (piece < 0 || piece >= static_cast<int32_t>(positions_.size())) {
    throw UseError("piece " + std::to_string(piece) + " is not in the plan (0.." +
                   std::to_string(positions_.size()) + ")");
  }
  return positions_[static_cast<size_t>(piece)];
}

int32_t Schedule::next_of(int32_t position) const {
  return position + 1 == static_cast<int32_t>(cycle_.size()) ? 0 : position + 1;
}

int32_t Schedule::distance(int32_t from, int32_t to) const {
  const int32_t steps = to - from;
  return steps > 0 ? steps : steps + static_cast<int32_t>(cycle_.size());
}

bool Schedule::is_fetched(int32_t piece) const {
  const int32_t position = position_of(piece);
  return position >= 0 && cycle_[static_cast<size_t>(position)].state == State::kFetched;
}

bool Schedule::may_fetch(int32_t position) const {
  const Entry& entry = cycle_[static_cast<size_t>(position)];
  if (entry.state == State::kFetched || entry.state == State::kLive) {
    return false;
  }
  // The slot's last user in the cycle, or the lookahead's limit, has been passed. validate() saw
  // that no piece between `after` and this one needs the same bytes.
  return entry.after < 0 || distance(last_, position) <= distance(entry.after, position);
}

void Schedule::fetch(int32_t position, std::vector<Action>& actions) {
  Entry& entry = cycle_[static_cast<size_t>(position)];
  Action action{Action::Kind::kFetch, entry.piece};
  int64_t latest = -1;
  const auto overwrite = [&](Entry& earlier) {
    if (earlier.released_at > latest) {
      latest = earlier.released_at;
      action.overwritten = earlier.piece;
    }
    // It stays unused: another fetch into the rest of its range, on another stream, waits as well.
    if (!earlier.used) {
      actions.push_back({Action::Kind::kOutrun, earlier.piece});
    }
  };
  overwrite(entry);
  for (const int32_t other : entry.overlaps) {
    overwrite(cycle_[static_cast<size_t>(other)]);
    cycle_[static_cast<size_t>(other)].state = State::kAbsent;
  }
  entry.state = State::kFetched;
  entry.used = false;
  actions.push_back(action);
}

void Schedule::fetch_ahead(std::vector<Action>& actions) {
  if (!fetches_ahead_ || cycle_.empty()) {
    return;
  }
  // At most one round: with room for all of them the pieces follow each other for ever.
  for (size_t i = 0; i < cycle_.size() && may_fetch(next_); ++i) {
    Entry& entry = cycle_[static_cast<size_t>(next_)];
    if (entry.state == State::kSpent) {
      entry.state = State::kFetched;  // still intact: no copy
    } else {
      fetch(next_, actions);
    }
    next_ = next_of(next_);
  }
}

// Out of the planned order: what lies ready just ahead of `position` stays, everything else that
// was fetched becomes spent (intact, but free to be overwritten), and fetching goes on behind it.
void Schedule::anchor(int32_t position) {
  int32_t next = next_of(position);
  std::vector<bool> ahead(cycle_.size(), false);
  while (next != position) {
    Entry& entry = cycle_[static_cast<size_t>(next)];
    if (entry.state != State::kFetched && entry.state != State::kSpent) {
      break;
    }
    ahead[static_cast<size_t>(next)] = true;
    entry.state = State::kFetched;
    next = next_of(next);
  }
  for (size_t i = 0; i < cycle_.size(); ++i) {
    if (cycle_[i].state == State::kFetched && !ahead[i]) {
      cycle_[i].state = State::kSpent;
    }
  }
  next_ = next;
}

void Schedule::acquire(int32_t piece, std::vector<Action>& actions) {
  if (piece == live_) {
    return;
  }
  const int32_t position = position_of(piece);
  if (position < 0) {
    return;
  }
  if (live_ >= 0) {
    release_live(actions);  // its last leaf did not run: skipped
  }
  const bool expected = next_of(last_) == position;
  Entry& entry = cycle_[static_cast<size_t>(position)];
  const bool absent = entry.state == State::kAbsent;
  if (absent) {
    mispredicted_ += fetches_ahead_ ? 1 : 0;
    fetch(position, actions);
  }
  entry.state = State::kLive;
  entry.used = true;
  live_ = piece;
  last_ = position == 0 ? static_cast<int32_t>(cycle_.size()) - 1 : position - 1;
  actions.push_back({Action::Kind::kWait, piece});
  if (!expected || absent) {
    anchor(position);
    fetch_ahead(actions);
  }
}

void Schedule::release_live(std::vector<Action>& actions) {
  const int32_t position = position_of(live_);
  Entry& entry = cycle_[static_cast<size_t>(position)];
  entry.state = keep_spent_ ? State::kSpent : State::kAbsent;
  entry.released_at = num_releases_++;
  actions.push_back({Action::Kind::kRelease, live_});
  live_ = -1;
  last_ = position;
}

void Schedule::release(int32_t piece, std::vector<Action>& actions) {
  if (live_ < 0 || piece != live_) {
    return;
  }
  release_live(actions);
  fetch_ahead(actions);
}

void Schedule::end(std::vector<Action>& actions) {
  if (live_ >= 0) {
    release_live(actions);
    fetch_ahead(actions);
  }
}

void Schedule::invalidate(int32_t piece) {
  const int32_t position = position_of(piece);
  if (position < 0) {
    return;
  }
  if (piece == live_) {
    throw UseError("piece " + std::to_string(piece) + " changed while the model runs it");
  }
  cycle_[static_cast<size_t>(position)].state = State::kAbsent;
  anchor(last_);
}

void Schedule::check_valid() const {
  for (size_t a = 0; a < cycle_.size(); ++a) {
    const Entry& entry = cycle_[a];
    if ((entry.state == State::kLive) != (entry.piece == live_)) {
      throw UseError("piece " + std::to_string(entry.piece) + " is live beside piece " +
                     std::to_string(live_));
    }
    if (entry.state != State::kFetched && entry.state != State::kLive) {
      continue;
    }
    for (const int32_t other : entry.overlaps) {
      const Entry& rival = cycle_[static_cast<size_t>(other)];
      if (rival.state == State::kFetched || rival.state == State::kLive) {
        throw UseError("pieces " + std::to_string(entry.piece) + " and " +
                       std::to_string(rival.piece) + " both claim bytes of the ring");
      }
    }
  }
}

}  // namespace blockswap
