#pragma once

#include <memory>

#include "caching_pool.h"

namespace blockswap {

// The pools that serve PyTorch, one per device. Thread-safe.

// The pool that serves a device, made when first asked for. Throws DeviceError.
std::shared_ptr<CachingPool> pluggable_pool(int device);
// Serves the device from this pool from now on; nullptr: from a new one when next asked for.
// pre: no block of the one before is in use; on_pressure of the new one never waits for Python.
void set_pluggable_pool(int device, std::shared_ptr<CachingPool> pool);
// Whether PyTorch may allocate from it.
bool is_pluggable(const CachingPool& pool);

// `stream` uses the block, too; nothing happens for memory that is of none of these pools.
void record_pluggable_use(void* address, Device::Stream stream);
// Unmaps what can be unmapped without waiting, on all devices.
void trim_pluggable_pools();

}  // namespace blockswap
