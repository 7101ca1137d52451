// What a Cycle costs in time; cycle.cpp selects its pieces and gives them slots.

#include <algorithm>
#include <cmath>

#include "cycle.h"

namespace blockswap {

void Cycle::select(const std::vector<char>& resident, Issue& issue) const {
  const HostPace& pace = issue.pace;
  double over = pace.head;
  int copies = 0;
  for (size_t p = 0; p < pieces_.size(); ++p) {
    if (resident[p]) {
      over = std::max(over + pieces_[p].own, pace.over[p] + pace.seconds_per_copy * copies);
      continue;
    }
    issue.gap_over[copies] = over;
    issue.own_over[copies] = over = pace.over[p] + pace.seconds_per_copy * (copies + 1);
    ++copies;
  }
  issue.last_gap_over = over;
}

double Cycle::replay(int max_steps, double slowdown, Host host) {
  const Issue& issue = issue_of(host);
  const double issue_seconds = issue.pace.step_with(num_streamed_);
  if (num_streamed_ == 0) return std::max(compute_seconds_, issue_seconds);
  if (lookahead_ == 0) {
    return std::max(compute_seconds_ + copy_seconds_ * slowdown, issue_seconds);
  }
  const int n = num_streamed_;
  std::fill(release_.begin(), release_.begin() + n, 0.0);
  // No schedule is faster than either; a slow drain of fetched-ahead bytes may take many steps.
  const double floor = std::max({compute_seconds_, copy_seconds_ * slowdown, issue_seconds});
  double run = 0.0, link = 0.0, step = 0.0, begin = 0.0;
  for (int s = 0; s < max_steps; ++s) {
    const double run_before = run, link_before = link;
    for (int i = 0; i < n; ++i) {
      // release_ still holds the step before for this position and those after it.
      link = std::max(link, release_[after_[i]]) + copy_[i] * slowdown;
      run = std::max({run + gap_[i], begin + issue.gap_over[i], link});
      const double run_begin = run;
      run = std::max(run + own_[i], begin + issue.own_over[i]);
      release_[i] = std::max(run_begin, run - tail_[i]);
    }
    run = std::max(run + last_gap_, begin + issue.last_gap_over);
    begin += issue_seconds;
    step = run - run_before;
    work_ += n;
    const double tolerance = 1e-6 * step;
    if (s > 0 && std::fabs(link - link_before - step) <= tolerance) break;
    if (s > 0 && step <= floor + tolerance) break;
  }
  return std::max(step, floor);
}

}  // namespace blockswap
