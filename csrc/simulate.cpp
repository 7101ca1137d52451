#include "simulate.h"

#include <algorithm>
#include <cmath>

#include "error.h"
#include "host_pace.h"

namespace blockswap {
namespace {

// Long enough for a ring that drains slowly to run dry; a step costs a microsecond or two.
constexpr int kMaxSteps = 64;
// Step times may alternate with a short period for ever; 12 holds periods of 2, 3, 4 and 6.
constexpr int kPeriod = 12;

}  // namespace

Simulation simulate(const Plan& plan, const PlanRequest& request) {
  if (!(request.link.bytes_per_second > 0.0)) {
    throw ConfigError("simulate: the link's bytes per second must be above 0, it is " +
                      std::to_string(request.link.bytes_per_second));
  }
  const size_t n = plan.pieces.size();
  Simulation result;
  result.pieces.resize(n);
  std::vector<double> copy(n, 0.0), release(n, 0.0), before(n, 0.0);
  for (size_t i = 0; i < n; ++i) {
    const Piece& piece = plan.pieces[i];
    if (piece.resident) continue;
    if (piece.after < 0 || piece.after >= static_cast<int32_t>(n)) {
      throw ConfigError("simulate: piece " + std::to_string(i) + " has no slot yet");
    }
    copy[i] = static_cast<double>(piece.bytes) / request.link.bytes_per_second +
              request.link.seconds_per_copy;
    result.link_busy_seconds += copy[i];
  }
  const HostPace pace = host_pace(plan.pieces, request);
  const auto is_streamed = [](const Piece& piece) { return !piece.resident; };
  const auto num_copies = std::count_if(plan.pieces.begin(), plan.pieces.end(), is_streamed);
  double run = 0.0, link = 0.0;
  double host = 0.0;  // when it begins to issue the step
  std::vector<double> ends;
  for (int step = 0; step < kMaxSteps; ++step) {
    const double step_begin = run, link_before = link;
    result.stall_seconds = 0.0;
    before = release;
    run = std::max(run + request.head_seconds, host + pace.head);
    for (size_t i = 0; i < n; ++i) {
      const Piece& piece = plan.pieces[i];
      SimulatedPiece& seen = result.pieces[i];
      seen = {};
      double ready = run;
      if (!piece.resident) {
        host += pace.seconds_per_copy;
        // release still holds the step before for pieces that have not run in this one.
        double begin = std::max(link, release[piece.after]);
        if (plan.copy_on_compute) begin = std::max(begin, run);
        link = begin + copy[i];
        ready = link;
        seen.copy_begin = begin - step_begin;
        seen.copy_end = link - step_begin;
      }
      const double begin = std::max(run, ready);
      seen.stall_seconds = begin - run;
      result.stall_seconds += seen.stall_seconds;
      run = std::max(begin + piece.seconds, host + pace.over[i]);
      release[i] = std::max(begin, run - piece.tail_seconds);
      seen.run_begin = begin - step_begin;
      seen.run_end = run - step_begin;
    }
    ends.push_back(run);
    host += pace.step;
    // Steady: every event of this step is one of the step before, moved by the same time.
    const double seconds = run - step_begin;
    const double tolerance = 1e-9 * std::max(seconds, 1e-9);
    bool steady = step > 0 && (result.link_busy_seconds == 0.0 ||
                               std::fabs(link - link_before - seconds) <= tolerance);
    for (size_t i = 0; steady && i < n; ++i) {
      steady = std::fabs(release[i] - before[i] - seconds) <= tolerance;
    }
    result.step_seconds = seconds;
    if (steady) break;
    if (step + 1 == kMaxSteps) {
      result.step_seconds = (ends.back() - ends[ends.size() - 1 - kPeriod]) / kPeriod;
    }
  }
  // A device that is still behind a slower host looks steady until it has caught up.
  result.step_seconds = std::max({result.step_seconds, result.link_busy_seconds,
                                  pace.step_with(static_cast<int>(num_copies))});
  return result;
}

}  // namespace blockswap
