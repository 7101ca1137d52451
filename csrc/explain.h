#pragma once

#include <string>

#include "plan.h"
#include "simulate.h"

namespace blockswap {

// One or two sentences: what keeps the step from being faster.
std::string reason_of(const Plan& plan, const PlanRequest& request, const Simulation& simulation);

}  // namespace blockswap
