#pragma once

#include <cstdint>

#include "plan.h"

namespace blockswap {

// An image is the bytes of tensors that move together, exactly as they lie in their slot: each
// tensor starts at the next multiple of kAlignment, and the image's size is one, too, so that
// neighbouring images form one contiguous piece.
constexpr int64_t align_up(int64_t bytes) {
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

// Lays tensors out one after another: place() returns each one's offset.
class ImageLayout {
 public:
  int64_t place(int64_t bytes) {
    const int64_t offset = bytes_;
    bytes_ += align_up(bytes);
    return offset;
  }
  int64_t bytes() const { return bytes_; }

 private:
  int64_t bytes_ = 0;
};

}  // namespace blockswap
