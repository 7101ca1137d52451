#include "pool.h"

#include <exception>

#include "../os.h"
#include "pluggable.h"

namespace blockswap {

void Pool::release() noexcept {
  if (os::process_is_exiting()) {
    return;  // the driver may be gone
  }
  bool is_idle = false;
  for (const auto& [address, bytes] : sizes_) {
    try {
      // The first one waits for the device, for all of them.
      is_idle ? pool_->free_unused(address) : pool_->free_sync(address);
      is_idle = true;
    } catch (const std::exception&) {
      // The device is failing: this memory is lost to the process.
    }
  }
  sizes_.clear();
  bytes_ = 0;
}

std::shared_ptr<CachingPool> session_pool(const std::string& type, int index,
                                          const std::shared_ptr<Device>& device) {
  if (type == "cuda") {
    return pluggable_pool(index);
  }
  return std::make_shared<CachingPool>(device, make_block_pages(device), CachingPool::kNoLimit);
}

}  // namespace blockswap
