#pragma once

#include <vector>

#include "plan.h"

namespace blockswap {

// How far the host has come while it issues a step. The device cannot run what was not issued yet,
// however fast it is: with small kernels the host sets the pace.
struct HostPace {
  // Per piece, seconds from the step's first call: no sooner can the piece be over. Copies are not
  // counted: each one that is issued before delays it by seconds_per_copy.
  std::vector<double> over;
  double head = 0.0;              // the same for what precedes the first leaf
  double step = 0.0;              // to issue all leaves
  double seconds_per_copy = 0.0;  // acquire, fetch and release of one streamed piece

  double step_with(int copies) const { return step + seconds_per_copy * copies; }
};

// Of a host that needs `share` of the measured time for the model's own work.
HostPace host_pace(const std::vector<Piece>& pieces, const PlanRequest& request,
                   double share = 1.0);

}  // namespace blockswap
