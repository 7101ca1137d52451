#pragma once

#include <cstdint>

#include "cycle.h"
#include "plan.h"

namespace blockswap {

// The laps under which the selected pieces run fastest in a ring of limit_bytes.
Cycle::Laps best_laps(Cycle& cycle, int64_t limit_bytes, int max_starts, int replay_steps);

// Makes streamed pieces resident where the budget has room left beside the ring, highest level and
// largest piece first, never below offload_bytes. The others keep their slots, so each fetch may
// only start earlier: the step never gets longer. True when it made any.
bool fill_budget(Plan& plan, const PlanRequest& request);

}  // namespace blockswap
