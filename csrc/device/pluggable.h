#pragma once

#include <sys/types.h>

#include <memory>
#include <string>

#include "caching_pool.h"

// The C entry points that torch.cuda.memory.CUDAPluggableAllocator looks up by name in the library.
// `device` is an index, `stream` a cudaStream_t. Neither throws: what goes wrong is kept for
// take_pluggable_error().
#define BS_EXPORT __attribute__((visibility("default")))
extern "C" {
// nullptr when there is no memory, or for no bytes.
BS_EXPORT void* blockswap_alloc(ssize_t bytes, int device, void* stream);
BS_EXPORT void blockswap_free(void* address, ssize_t bytes, int device, void* stream);
}

namespace blockswap {

// The pool that serves a device, made when first asked for. Throws DeviceError.
std::shared_ptr<CachingPool> pluggable_pool(int device);
// Serves the device from this pool from now on; nullptr: from a new one when next asked for.
// pre: no block of the one before is in use.
void set_pluggable_pool(int device, std::shared_ptr<CachingPool> pool);
// What went wrong last, once; empty if nothing did.
std::string take_pluggable_error();

}  // namespace blockswap
