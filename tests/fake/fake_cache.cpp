#include "fake_cache.h"

#include <iterator>

namespace fake {
namespace {

constexpr size_t kMiB = size_t{1} << 20;
// PyTorch's numbers.
constexpr size_t kSmallBytes = 1 * kMiB;  // requests up to this share small segments
constexpr size_t kSmallSegmentBytes = 2 * kMiB;
constexpr size_t kMiddleSegmentBytes = 20 * kMiB;
constexpr size_t kLargeBytes = 10 * kMiB;  // requests from this on get segments of their own size
constexpr size_t kLargeStepBytes = 2 * kMiB;
constexpr size_t kLeastSmallPieceBytes = 512;

}  // namespace

size_t Cache::segment_bytes(size_t bytes) {
  if (bytes <= kSmallBytes) {
    return kSmallSegmentBytes;
  }
  if (bytes < kLargeBytes) {
    return kMiddleSegmentBytes;
  }
  return (bytes + kLargeStepBytes - 1) / kLargeStepBytes * kLargeStepBytes;
}

std::optional<uint64_t> Cache::try_take(size_t bytes, int64_t stream) {
  const bool is_small = bytes <= kSmallBytes;
  const auto found = free_.lower_bound(Key{is_small, stream, bytes, 0});
  if (found == free_.end() || std::get<0>(*found) != is_small || std::get<1>(*found) != stream) {
    return std::nullopt;
  }
  const auto piece = pieces_.find(std::get<3>(*found));
  free_.erase(found);
  return take(piece, bytes);
}

uint64_t Cache::take_new(size_t bytes, int64_t stream) {
  const uint64_t begin = next_segment_;
  const size_t whole = segment_bytes(bytes);
  next_segment_ += whole;
  segments_.emplace(begin, whole);
  const Piece piece{whole, begin, stream, bytes <= kSmallBytes, /*is_free=*/true};
  return take(pieces_.emplace(begin, piece).first, bytes);
}

void Cache::put(uint64_t place) {
  auto piece = pieces_.find(place);
  piece->second.is_free = true;
  merge_next(piece);
  if (piece != pieces_.begin() && std::prev(piece)->second.is_free) {
    const auto before = std::prev(piece);
    if (before->second.segment == piece->second.segment) {
      free_.erase(key_of(before));
      merge_next(before);
      piece = before;
    }
  }
  free_.insert(key_of(piece));
}

size_t Cache::give_back() {
  size_t given = 0;
  for (auto segment = segments_.begin(); segment != segments_.end();) {
    const auto piece = pieces_.find(segment->first);
    if (piece->second.is_free && piece->second.bytes == segment->second) {
      given += segment->second;
      free_.erase(key_of(piece));
      pieces_.erase(piece);
      segment = segments_.erase(segment);
    } else {
      ++segment;
    }
  }
  return given;
}

Cache::Key Cache::key_of(Pieces::const_iterator piece) {
  const auto& [place, of] = *piece;
  return {of.is_small, of.stream, of.bytes, place};
}

// pre: the piece is free, large enough, and not among the free ones any more.
uint64_t Cache::take(Pieces::iterator piece, size_t bytes) {
  auto& [place, taken] = *piece;
  const size_t left = taken.bytes - bytes;
  if (taken.is_small ? left >= kLeastSmallPieceBytes : left > kSmallBytes) {
    Piece rest = taken;
    rest.bytes = left;
    free_.insert(key_of(pieces_.emplace(place + bytes, rest).first));
    taken.bytes = bytes;
  }
  taken.is_free = false;
  return place;
}

// Makes one of a free piece, which is not among the free ones, and the free one behind it.
void Cache::merge_next(Pieces::iterator piece) {
  const auto next = std::next(piece);
  if (next == pieces_.end() || !next->second.is_free ||
      next->second.segment != piece->second.segment) {
    return;
  }
  free_.erase(key_of(next));
  piece->second.bytes += next->second.bytes;
  pieces_.erase(next);
}

}  // namespace fake
