#pragma once

#include <cstddef>

#include "device/pluggable.h"

#if BS_WITH_GPU
#include <torch/csrc/cuda/CUDAPluggableAllocator.h>
#endif

namespace blockswap {

#if BS_WITH_GPU
using TorchStream = cudaStream_t;
#else
using TorchStream = void*;  // what a build without GPU calls in its tests
#endif

// PyTorch has two plugs for an allocator, and they want different things.
//
// The process' allocator: every tensor's memory is asked for and freed here. Nothing of PyTorch's
// is locked meanwhile, an exception goes to whoever made the tensor, and PyTorch keeps no cache.
// Throws c10::OutOfMemoryError, torch.OutOfMemoryError in Python, with the pool's numbers.
void* torch_alloc(size_t bytes, int device, TorchStream stream);
// Never throws: tensors die in destructors. What goes wrong is a warning, and the block stays lost.
void torch_free(void* address, size_t bytes, int device, TorchStream stream);
void torch_record_stream(void* address, TorchStream stream);
void torch_empty_cache();
void torch_set_memory_fraction(double fraction, int device);
// A graph's memory must outlive its capture untouched; the pool cannot promise that yet.
[[noreturn]] void torch_refuse_graphs();

// A torch.cuda.MemPool: PyTorch's own cache lies above, asks here for whole segments and holds its
// lock meanwhile. nullptr when there is no memory: PyTorch then gives back its unused segments,
// asks again, and reports it itself. A graph that is being captured gets memory that nobody uses;
// PyTorch keeps that apart until the MemPool dies.
void* mem_pool_alloc(size_t bytes, int device, TorchStream stream);
// Waits for the device, as cudaFree does: PyTorch relies on that, since tensors of any stream may
// have lain in the segment. Never throws.
void mem_pool_free(void* address, size_t bytes, int device, TorchStream stream);

// Makes the pools PyTorch's allocator for the rest of the process. Throws what PyTorch says when it
// has an allocator in use already, DeviceError in a build without GPU.
void install_torch_allocator();

}  // namespace blockswap
