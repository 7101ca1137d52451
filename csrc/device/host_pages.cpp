// Host memory that plays a device: no page may be touched before it is mapped or after it is
// unmapped, and only so many may be mapped at once.

#include <algorithm>

#include "../error.h"
#include "../os.h"
#include "pages.h"

namespace blockswap {
namespace {

constexpr int64_t kRangeFactor = 4;  // addresses per byte of memory

class HostPages final : public Pages {
 public:
  HostPages(int64_t limit_bytes, int64_t page_bytes, int64_t batch_bytes)
      : limit_bytes_(limit_bytes),
        page_bytes_(page_bytes),
        batches_(page_bytes, std::max(page_bytes, batch_bytes)) {
    const bool is_power = page_bytes > 0 && (page_bytes & (page_bytes - 1)) == 0;
    if (limit_bytes <= 0 || !is_power || page_bytes < os::page_bytes()) {
      throw ConfigError("host pages of " + format_bytes(page_bytes) + " under a limit of " +
                        format_bytes(limit_bytes) + ": pages must be a power of two of at least " +
                        format_bytes(os::page_bytes()) + ", the limit positive");
    }
  }

  int64_t granularity_bytes() const override { return page_bytes_; }
  bool is_sparse() const override { return true; }
  int64_t total_bytes() const override { return limit_bytes_; }
  int64_t range_bytes(int64_t bytes) const override {
    const int64_t wanted = std::max(bytes, kRangeFactor * limit_bytes_);
    return (wanted + page_bytes_ - 1) / page_bytes_ * page_bytes_;
  }

  uint64_t reserve(int64_t bytes) override {
    void* range = os::try_reserve_addresses(bytes, page_bytes_);
    if (range == nullptr) {
      throw OutOfMemory("the system refuses to reserve " + format_bytes(bytes) + " of addresses");
    }
    return reinterpret_cast<uint64_t>(range);
  }
  void release(uint64_t address, int64_t bytes) noexcept override {
    os::unreserve(reinterpret_cast<void*>(address), bytes);
  }
  void map(uint64_t address, int64_t bytes) override {
    if (mapped_bytes_ + bytes > limit_bytes_ ||
        !os::allow(reinterpret_cast<void*>(address), bytes)) {
      throw OutOfMemory("cannot map " + format_bytes(bytes) + ": " + format_bytes(mapped_bytes_) +
                        " of " + format_bytes(limit_bytes_) + " are mapped");
    }
    mapped_bytes_ += bytes;
    for (const int64_t batch : batches_.cut(bytes)) {
      batches_.note(address, batch);
      address += static_cast<uint64_t>(batch);
    }
  }
  // As a driver: part of a batch stays mapped.
  void unmap(uint64_t address, int64_t bytes) noexcept override {
    for (const PageRange& batch : batches_.take(address, bytes)) {
      os::forbid(reinterpret_cast<void*>(batch.address), batch.bytes);
      mapped_bytes_ -= batch.bytes;
    }
  }
  PageRange whole(uint64_t address, int64_t bytes, int64_t at_least_bytes) const override {
    return batches_.whole(address, bytes, at_least_bytes);
  }

 private:
  int64_t limit_bytes_;
  int64_t page_bytes_;
  Batches batches_;
  int64_t mapped_bytes_ = 0;
};

}  // namespace

std::unique_ptr<Pages> make_host_pages(int64_t limit_bytes, int64_t page_bytes,
                                       int64_t batch_bytes) {
  return std::make_unique<HostPages>(limit_bytes, page_bytes, batch_bytes);
}

}  // namespace blockswap
