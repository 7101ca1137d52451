#pragma once

#include <cstdint>
#include <memory>

#include "batches.h"
#include "device.h"

namespace blockswap {

// Device memory whose addresses are reserved apart from its pages, so that pages come and go while
// addresses stay. Three implementations: cuda_pages.cpp (virtual memory of CUDA and HIP),
// segment_pages.cpp (any Device: a range is one allocation) and host_pages.cpp (tests: touching an
// unmapped page faults).
//
// Common rules: bytes > 0; bytes and addresses given to map() and unmap() are multiples of
// granularity_bytes() and lie in one reserved range. What throws, throws DeviceError (OutOfMemory
// where that is the reason) with the numbers and has changed nothing. Nothing waits for the device,
// except where is_sparse() is false. Not thread-safe: one pool owns it.
class Pages {
 public:
  Pages() = default;
  Pages(const Pages&) = delete;
  Pages& operator=(const Pages&) = delete;
  virtual ~Pages() = default;

  // A power of two; where is_sparse(), ranges begin at a multiple of it.
  virtual int64_t granularity_bytes() const = 0;
  // False: a range has its memory from reserve() to release(), is mapped and unmapped only as a
  // whole, and release() may wait for the device.
  virtual bool is_sparse() const = 0;
  // The most that can be mapped at once, by whomever; INT64_MAX where it is not known.
  virtual int64_t total_bytes() const = 0;
  // How large a range to reserve so that a block of `bytes` finds room in it, a multiple of the
  // granularity: where addresses are plentiful, far more than there is memory.
  virtual int64_t range_bytes(int64_t bytes) const = 0;

  virtual uint64_t reserve(int64_t bytes) = 0;
  // pre: exactly the range of one reserve(), nothing in it is mapped.
  virtual void release(uint64_t address, int64_t bytes) noexcept = 0;

  // pre: nothing in [address, address + bytes) is mapped. The contents are undefined.
  virtual void map(uint64_t address, int64_t bytes) = 0;
  // pre: all of it is mapped, no work on the device uses it any more, and whole() leaves it as it
  // is.
  virtual void unmap(uint64_t address, int64_t bytes) noexcept = 0;
  // What unmap() takes of a mapped range, from the first on: at least so many bytes, or all it
  // takes.
  virtual PageRange whole(uint64_t address, int64_t bytes, int64_t at_least_bytes) const = 0;
};

// Pages of at least `page_bytes`: the driver's own size (2 MiB) times a power of two, mapped in
// batches of up to 8 MiB. Every GPU that can reach this one may read and write them. nullptr: the
// driver says that it cannot map pages, so use segments; any other failure throws DeviceError.
std::unique_ptr<Pages> make_gpu_pages(int index, int64_t page_bytes);  // only with BS_WITH_GPU
std::unique_ptr<Pages> make_segment_pages(std::shared_ptr<Device> device);
// Each block is one allocation of just its size: for devices whose memory is small, in tests.
std::unique_ptr<Pages> make_block_pages(std::shared_ptr<Device> device);
// Host memory that plays a device of `limit_bytes`, mapped in batches of up to `batch_bytes`.
std::unique_ptr<Pages> make_host_pages(int64_t limit_bytes, int64_t page_bytes,
                                       int64_t batch_bytes = 0);

}  // namespace blockswap
