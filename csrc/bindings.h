#pragma once

#include <pybind11/pybind11.h>

namespace blockswap {

// Adds the planner (Leaf, PlanRequest, Plan, make_plan, simulate, ...) to the module.
void bind_plan(pybind11::module_& m);
// Adds the caching pool (CachingPool, PoolStats, make_host_pages, ...). After Device.
void bind_pool(pybind11::module_& m);
// Adds the replays of benchmarks/allocator.py.
void bind_replay(pybind11::module_& m);

}  // namespace blockswap
