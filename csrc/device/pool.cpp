#include "pool.h"

#include <exception>
#include <utility>

#include "../os.h"
#include "pluggable.h"

namespace blockswap {
namespace {

// Devices whose pages cannot be mapped apart, and whose memory is small in tests: each block is one
// allocation, of just its size.
class BlockPages final : public Pages {
 public:
  explicit BlockPages(std::shared_ptr<Device> device) : device_(std::move(device)) {}

  int64_t granularity_bytes() const override { return kUnit; }
  bool is_sparse() const override { return false; }
  int64_t total_bytes() const override { return INT64_MAX; }
  int64_t range_bytes(int64_t bytes) const override { return (bytes + kUnit - 1) / kUnit * kUnit; }
  uint64_t reserve(int64_t bytes) override {
    return reinterpret_cast<uint64_t>(device_->allocate(bytes));
  }
  void release(uint64_t address, int64_t) noexcept override {
    device_->deallocate(reinterpret_cast<void*>(address));
  }
  void map(uint64_t, int64_t) override {}
  void unmap(uint64_t, int64_t) noexcept override {}

 private:
  static constexpr int64_t kUnit = 512;

  std::shared_ptr<Device> device_;
};

}  // namespace

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
  return std::make_shared<CachingPool>(device, std::make_unique<BlockPages>(device),
                                       CachingPool::kNoLimit);
}

}  // namespace blockswap
