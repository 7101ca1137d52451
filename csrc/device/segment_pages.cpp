// Where pages cannot be mapped: each range is one allocation of the device.

#include <utility>

#include "pages.h"

namespace blockswap {
namespace {

constexpr int64_t kMiB = int64_t{1} << 20;

class UnmappedPages : public Pages {
 public:
  UnmappedPages(std::shared_ptr<Device> device, int64_t granularity_bytes)
      : device_(std::move(device)), granularity_bytes_(granularity_bytes) {}

  int64_t granularity_bytes() const override { return granularity_bytes_; }
  bool is_sparse() const override { return false; }
  int64_t total_bytes() const override { return INT64_MAX; }
  int64_t range_bytes(int64_t bytes) const override {
    return (bytes + granularity_bytes_ - 1) / granularity_bytes_ * granularity_bytes_;
  }

  uint64_t reserve(int64_t bytes) override {
    return reinterpret_cast<uint64_t>(device_->allocate(bytes));
  }
  void release(uint64_t address, int64_t) noexcept override {
    device_->deallocate(reinterpret_cast<void*>(address));
  }
  void map(uint64_t, int64_t) override {}
  void unmap(uint64_t, int64_t) noexcept override {}
  PageRange whole(uint64_t address, int64_t bytes, int64_t) const override {
    return {address, bytes};
  }

 private:
  std::shared_ptr<Device> device_;
  int64_t granularity_bytes_;
};

// Sizes as in PyTorch's own allocator: small blocks share 2 MiB, middle ones 20 MiB, so that few
// allocations are made.
class SegmentPages final : public UnmappedPages {
 public:
  explicit SegmentPages(std::shared_ptr<Device> device)
      : UnmappedPages(std::move(device), 2 * kMiB) {}

  int64_t range_bytes(int64_t bytes) const override {
    const bool is_middle = bytes > 1 * kMiB && bytes < 10 * kMiB;
    return is_middle ? 20 * kMiB : UnmappedPages::range_bytes(bytes);
  }
};

}  // namespace

std::unique_ptr<Pages> make_segment_pages(std::shared_ptr<Device> device) {
  return std::make_unique<SegmentPages>(std::move(device));
}

std::unique_ptr<Pages> make_block_pages(std::shared_ptr<Device> device) {
  return std::make_unique<UnmappedPages>(std::move(device), 512);
}

}  // namespace blockswap
