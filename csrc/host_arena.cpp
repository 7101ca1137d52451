// Two concepts. A *chunk* is what one registration covers; it begins and ends at pages, so that two
// registrations never share one. A *released* range belongs to nobody; its pages go back as soon as
// they hold nothing else and no device holds their chunk.
#include "host_arena.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <iterator>
#include <string>
#include <utility>

#include "arena_fill.h"
#include "error.h"
#include "os.h"
#include "plan.h"

namespace blockswap {
namespace {

constexpr int kMaxThreads = 16;

int64_t round_down(int64_t value, int64_t unit) { return value / unit * unit; }
int64_t round_up(int64_t value, int64_t unit) { return round_down(value + unit - 1, unit); }

}  // namespace

ArenaLayout HostArena::make_layout(const std::vector<int64_t>& image_bytes, int64_t chunk_bytes) {
  ArenaLayout layout;
  layout.chunk_offsets.push_back(0);
  int64_t end = 0;
  for (const int64_t bytes : image_bytes) {
    if (bytes < 0) {
      throw UseError("an image of " + std::to_string(bytes) + " bytes");
    }
    const int64_t image = round_up(bytes, kAlignment);
    const int64_t chunk = layout.chunk_offsets.back();
    if (end > chunk && end + image - chunk > chunk_bytes) {
      end = round_up(end, os::page_bytes());
      layout.chunk_offsets.push_back(end);
    }
    layout.image_offsets.push_back(end);
    end += image;
  }
  layout.bytes = end;
  return layout;
}

int HostArena::default_num_threads() { return std::min(kMaxThreads, os::num_usable_cores()); }

HostArena::HostArena(int64_t bytes, std::vector<int64_t> chunk_offsets)
    : bytes_(bytes), chunk_offsets_(std::move(chunk_offsets)), chunks_(chunk_offsets_.size()) {
  bool is_valid = bytes >= 0 && !chunk_offsets_.empty() && chunk_offsets_.front() == 0;
  for (size_t i = 1; i < chunk_offsets_.size(); ++i) {
    is_valid = is_valid && chunk_offsets_[i] > chunk_offsets_[i - 1] && chunk_offsets_[i] < bytes &&
               chunk_offsets_[i] % os::page_bytes() == 0;
  }
  if (!is_valid) {
    throw UseError("chunks of the host arena must begin at ascending pages within its " +
                   std::to_string(bytes) + " bytes, the first at 0");
  }
  mapped_bytes_ = round_up(std::max<int64_t>(bytes, 1), os::page_bytes());
  base_ = static_cast<uint8_t*>(os::try_reserve(mapped_bytes_, os::kHugePageBytes));
  if (base_ == nullptr) {
    const std::string reason = std::strerror(errno);
    throw ConfigError("host memory for the weights: the system refuses " + format_bytes(bytes) +
                      " (" + reason +
                      "): free host memory, raise the container's limit, or keep the weights in "
                      "files");
  }
  os::advise_huge(base_, mapped_bytes_);
}

HostArena::~HostArena() {
  if (!os::process_is_exiting()) {  // else the driver may be gone; the system takes the pages
    unpin();
  }
  os::unreserve(base_, mapped_bytes_);
}

int64_t HostArena::chunk_end(int64_t offset) const {
  const size_t next = chunk_at(offset) + 1;
  return next < chunk_offsets_.size() ? chunk_offsets_[next] : bytes_;
}

bool HostArena::fill(std::vector<Copy>& copies, int num_threads, const Progress& progress,
                     const PinCalls& pin, int64_t ahead_bytes) {
  std::vector<const Copy*> order;
  for (const Copy& copy : copies) {
    check_range(copy.offset, copy.bytes, "fill");
    if (copy.bytes > 0) {
      order.push_back(&copy);
    }
  }
  std::sort(order.begin(), order.end(),
            [](const Copy* a, const Copy* b) { return a->offset < b->offset; });
  for (size_t i = 1; i < order.size(); ++i) {
    if (order[i - 1]->offset + order[i - 1]->bytes > order[i]->offset) {
      throw UseError("two copies into the host arena overlap at offset " +
                     std::to_string(order[i]->offset));
    }
  }
  ArenaFill work(*this, copies, num_threads > 0 ? num_threads : default_num_threads(), pin,
                 ahead_bytes);
  return work.run(progress);
}

bool HostArena::pin(const PinCalls& calls) { return pin_range(calls, 0, bytes_); }

bool HostArena::pin_range(const PinCalls& calls, int64_t offset, int64_t bytes) {
  check_range(offset, bytes, "pin");
  bool all_pinned = true;
  for (size_t chunk = 0; chunk < chunk_offsets_.size(); ++chunk) {
    const int64_t begin = chunk_offsets_[chunk];
    if (begin >= offset && chunk_end(begin) <= offset + bytes) {
      all_pinned = pin_chunk(calls, chunk) && all_pinned;
    }
  }
  return all_pinned;
}

bool HostArena::pin_chunk(const PinCalls& calls, size_t chunk) {
  const int64_t begin = chunk_offsets_[chunk];
  const std::lock_guard<std::mutex> one_at_a_time(pin_mutex_);
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (chunks_[chunk].pinned || bytes_ == 0) {
      return true;
    }
    chunks_[chunk].held = true;  // from here on release() keeps the pages
  }
  bool pinned = false;
  try {
    // The next chunk begins with a fresh page, so whole pages may be registered.
    pinned = calls.pin(base_ + begin, round_up(chunk_end(begin), os::page_bytes()) - begin);
  } catch (...) {
    let_go(chunk);
    throw;
  }
  if (!pinned) {
    let_go(chunk);
    return false;
  }
  os::watch_exit();  // after the driver's own exit handlers
  const std::lock_guard<std::mutex> lock(mutex_);
  chunks_[chunk].pinned = true;
  chunks_[chunk].unpin = calls.unpin;
  return true;
}

// No device holds the chunk any more: gives back what was released meanwhile.
void HostArena::let_go(size_t chunk) {
  const std::lock_guard<std::mutex> lock(mutex_);
  chunks_[chunk].held = false;
  const int64_t begin = chunk_offsets_[chunk];
  const int64_t end = round_up(chunk_end(begin), os::page_bytes());
  auto range = released_.upper_bound(begin);
  if (range != released_.begin()) {
    --range;
  }
  for (; range != released_.end() && range->first < end; ++range) {
    discard_locked(std::max(range->first, begin), std::min(range->second, end));
  }
}

void HostArena::unpin() {
  const std::lock_guard<std::mutex> one_at_a_time(pin_mutex_);
  for (size_t chunk = 0; chunk < chunk_offsets_.size(); ++chunk) {
    unpin_chunk(chunk);
  }
}

int64_t HostArena::unpin_last() {
  const std::lock_guard<std::mutex> one_at_a_time(pin_mutex_);
  int64_t bytes = 0;
  for (size_t chunk = chunk_offsets_.size(); chunk > 0 && bytes == 0; --chunk) {
    bytes = unpin_chunk(chunk - 1);
  }
  return bytes;
}

int64_t HostArena::unpin_chunk(size_t chunk) {
  std::function<void(void*)> call;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!chunks_[chunk].pinned) {
      return 0;
    }
    chunks_[chunk].pinned = false;
    call = std::move(chunks_[chunk].unpin);
  }
  const int64_t begin = chunk_offsets_[chunk];
  call(base_ + begin);
  let_go(chunk);
  return chunk_end(begin) - begin;
}

bool HostArena::is_pinned(int64_t offset, int64_t bytes) const {
  check_range(offset, bytes, "ask about");
  const std::lock_guard<std::mutex> lock(mutex_);
  for (size_t chunk = chunk_at(offset); chunk < chunk_offsets_.size(); ++chunk) {
    if (!chunks_[chunk].pinned) {
      return false;
    }
    if (chunk_end(chunk_offsets_[chunk]) >= offset + bytes) {
      break;
    }
  }
  return true;
}

int64_t HostArena::pinned_bytes() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  int64_t sum = 0;
  for (size_t chunk = 0; chunk < chunk_offsets_.size(); ++chunk) {
    if (chunks_[chunk].pinned) {
      sum += chunk_end(chunk_offsets_[chunk]) - chunk_offsets_[chunk];
    }
  }
  return sum;
}

void HostArena::release(int64_t offset, int64_t bytes) {
  check_range(offset, bytes, "release");
  if (bytes == 0) {
    return;
  }
  int64_t end = round_up(offset + bytes, kAlignment);
  end = end >= bytes_ ? mapped_bytes_ : end;  // nobody owns the rest of the last page
  const int64_t first_page = round_down(offset, os::page_bytes());
  const int64_t end_page = round_up(end, os::page_bytes());

  const std::lock_guard<std::mutex> lock(mutex_);
  if (released_.empty()) {
    os::advise_small(base_, mapped_bytes_);
  }
  int64_t begin = offset;
  auto range = released_.upper_bound(begin);
  if (range != released_.begin() && std::prev(range)->second >= begin) {
    --range;
  }
  while (range != released_.end() && range->first <= end) {  // joins what touches
    begin = std::min(begin, range->first);
    end = std::max(end, range->second);
    range = released_.erase(range);
  }
  released_.emplace(begin, end);

  // Only pages that hold a byte of this call are new. A chunk begins at a page: each page has one.
  int64_t page = std::max(round_up(begin, os::page_bytes()), first_page);
  const int64_t stop = std::min(round_down(end, os::page_bytes()), end_page);
  while (page < stop) {
    const int64_t next = std::min(stop, round_up(chunk_end(page), os::page_bytes()));
    if (!chunks_[chunk_at(page)].held) {
      discard_locked(page, next);
    }
    page = next;
  }
}

// Whole pages inside [begin, end), all of them released.
void HostArena::discard_locked(int64_t begin, int64_t end) {
  begin = round_up(begin, os::page_bytes());
  end = round_down(end, os::page_bytes());
  if (begin < end) {
    os::discard(base_ + begin, end - begin);
  }
}

int64_t HostArena::resident_bytes() const { return os::resident_bytes(base_, mapped_bytes_); }

void HostArena::check_range(int64_t offset, int64_t bytes, const char* verb) const {
  if (offset < 0 || bytes < 0 || offset > bytes_ || bytes > bytes_ - offset) {
    throw UseError(std::string("cannot ") + verb + " " + std::to_string(bytes) +
                   " bytes at offset " + std::to_string(offset) + " of a host arena of " +
                   std::to_string(bytes_) + " bytes");
  }
}

size_t HostArena::chunk_at(int64_t offset) const {
  const auto after = std::upper_bound(chunk_offsets_.begin(), chunk_offsets_.end(), offset);
  return static_cast<size_t>(after - chunk_offsets_.begin()) - 1;
}

}  // namespace blockswap
