#pragma once

#include <vector>

#include "plan.h"

namespace blockswap {

// One piece in the last simulated step, seconds from that step's start. Copies may begin before 0:
// they were fetched ahead in the step before.
struct SimulatedPiece {
  double copy_begin = 0.0, copy_end = 0.0;  // 0, 0 for residents
  double run_begin = 0.0, run_end = 0.0;
  double stall_seconds = 0.0;
};

struct Simulation {
  double step_seconds = 0.0;  // steady state
  double stall_seconds = 0.0;
  double link_busy_seconds = 0.0;
  std::vector<SimulatedPiece> pieces;
};

// Replays a plan with fixed slots: a fetch starts when the link is free and its `after` piece was
// released; a piece runs when its copy has landed. Several steps until the step time is steady.
Simulation simulate(const Plan& plan, const PlanRequest& request);

}  // namespace blockswap
