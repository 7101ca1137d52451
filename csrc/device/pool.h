#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <utility>

#include "../error.h"
#include "caching_pool.h"

namespace blockswap {

// The device memory of one session, small parameters, residents and ring: blocks of a caching pool
// that others may use, too. Frees what is left when it dies. One caller at a time.
class Pool {
 public:
  explicit Pool(std::shared_ptr<CachingPool> pool) : pool_(std::move(pool)) {}
  ~Pool() { release(); }
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  // As CachingPool's: stream-ordered. Throws OutOfMemory with the numbers.
  void* allocate(int64_t bytes, Device::Stream stream) {
    void* address = pool_->allocate(bytes, stream);
    sizes_.emplace(address, bytes);
    bytes_ += bytes;
    return address;
  }
  // pre: a block of allocate(), whose last use is over.
  void free(void* address) {
    const auto found = sizes_.find(address);
    if (found == sizes_.end()) {
      throw UseError("a session's pool does not hold this block");
    }
    pool_->free_unused(address);
    bytes_ -= found->second;
    sizes_.erase(found);
  }
  // Frees all that is left, once the device has done all its work.
  void release() noexcept;
  // Gives what nobody uses back to the device; the bytes given back. Never waits.
  int64_t give_back() { return pool_->trim(0); }

  int64_t bytes() const { return bytes_; }
  int64_t page_bytes() const { return pool_->page_bytes(); }
  // Mapped for whoever asks next, this session or another user of the same pool.
  int64_t unused_bytes() const {
    const PoolStats stats = pool_->stats();
    return stats.reserved_bytes - stats.allocated_bytes;
  }

 private:
  std::shared_ptr<CachingPool> pool_;
  std::unordered_map<void*, int64_t> sizes_;
  int64_t bytes_ = 0;
};

// The pool that sessions of a device share: of a GPU the one that may serve PyTorch, too.
std::shared_ptr<CachingPool> session_pool(const std::string& type, int index,
                                          const std::shared_ptr<Device>& device);

}  // namespace blockswap
