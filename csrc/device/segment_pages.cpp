// Where pages cannot be mapped: each range is one allocation of the device, as in PyTorch's own
// allocator. Small blocks share 2 MiB, middle ones 20 MiB, so that few allocations are made.

#include <utility>

#include "pages.h"

namespace blockswap {
namespace {

constexpr int64_t kMiB = int64_t{1} << 20;
constexpr int64_t kGranularityBytes = 2 * kMiB;
constexpr int64_t kSmallBytes = 1 * kMiB;
constexpr int64_t kMiddleBytes = 10 * kMiB;
constexpr int64_t kSharedBytes = 20 * kMiB;

class SegmentPages final : public Pages {
 public:
  explicit SegmentPages(std::shared_ptr<Device> device) : device_(std::move(device)) {}

  int64_t granularity_bytes() const override { return kGranularityBytes; }
  bool is_sparse() const override { return false; }
  int64_t total_bytes() const override { return INT64_MAX; }
  int64_t range_bytes(int64_t bytes) const override {
    if (bytes > kSmallBytes && bytes < kMiddleBytes) {
      return kSharedBytes;
    }
    return (bytes + kGranularityBytes - 1) / kGranularityBytes * kGranularityBytes;
  }

  uint64_t reserve(int64_t bytes) override {
    return reinterpret_cast<uint64_t>(device_->allocate(bytes));
  }
  void release(uint64_t address, int64_t) noexcept override {
    device_->deallocate(reinterpret_cast<void*>(address));
  }
  void map(uint64_t, int64_t) override {}
  void unmap(uint64_t, int64_t) noexcept override {}

 private:
  std::shared_ptr<Device> device_;
};

}  // namespace

std::unique_ptr<Pages> make_segment_pages(std::shared_ptr<Device> device) {
  return std::make_unique<SegmentPages>(std::move(device));
}

}  // namespace blockswap
