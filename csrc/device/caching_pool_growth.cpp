// Where the pool finds memory, from what costs nothing to what costs most:
//   1. a free block of the stream's own, or of anyone's;
//   2. one of another stream's whose last use is over;
//   3. new pages; where the limit or the driver refuses them, free pages from elsewhere;
//   4. one of another stream's, made safe by a wait on the device.
// Then allocate() asks on_pressure, and at the very end waits for the device itself.

#include <algorithm>

#include "../error.h"
#include "caching_pool.h"

namespace blockswap {
namespace {

constexpr int64_t kNoAddresses = -1;

thread_local bool is_asking = false;  // on_pressure runs on this thread

struct AskingGuard {
  AskingGuard() { is_asking = true; }
  ~AskingGuard() { is_asking = false; }
};

}  // namespace

Heap::Block* CachingPool::ask_for_locked(std::unique_lock<std::mutex>& lock, int64_t bytes,
                                         Heap::Owner owner) {
  Heap::Block* block = nullptr;
  int64_t least_bytes = INT64_MAX;
  while (block == nullptr && on_pressure_ && !is_asking) {
    const int64_t held_bytes = allocated_bytes_locked() + reserved_bytes_locked();
    if (held_bytes >= least_bytes) {
      break;  // it promised, and nothing came
    }
    least_bytes = held_bytes;
    ++stats_.num_retries;
    Pressure ask = on_pressure_;
    lock.unlock();  // it frees into this pool
    bool again = false;
    {
      const AskingGuard guard;
      again = ask(bytes);
      ask = nullptr;  // perhaps the last one: its end may need Python's lock, so not under ours
    }
    lock.lock();
    if (!again) {
      break;
    }
    block = try_allocate_locked(bytes, owner);
  }
  return block;
}

Heap::Block* CachingPool::try_allocate_locked(int64_t bytes, Heap::Owner owner) {
  Heap& heap = heap_for(bytes);
  if (!pending_.empty()) {
    free_pending_locked();
  }
  Heap::Block* block = heap.allocate(bytes, owner);
  const bool has_others = clocks_.size() > 1;
  if (block == nullptr && has_others) {
    share_done_locked();
    block = heap.allocate(bytes, owner);
  }
  if (block == nullptr) {
    heap.claim(owner);
    block = heap.allocate(bytes, owner);
  }
  if (block == nullptr) {
    block = grow_locked(heap, bytes, owner);
  }
  if (block == nullptr && has_others) {
    take_from_others_locked(heap, owner);
    block = heap.allocate(bytes, owner);
    if (block == nullptr) {
      block = grow_locked(heap, bytes, owner);  // beside larger free blocks now: fewer pages
    }
  }
  return block;
}

// What the stream itself has freed will not do: the graph may run on another one.
Heap::Block* CachingPool::try_allocate_unused_locked(int64_t bytes, Heap::Owner owner) {
  Heap& heap = heap_for(bytes);
  Heap::Block* block = heap.allocate_unused(bytes, owner);
  while (block == nullptr) {
    const int64_t missing_bytes = try_grow_locked(heap, bytes, Heap::kAnyone);
    if (missing_bytes != 0 && give_back_from_locked(large_, missing_bytes) +
                                      give_back_from_locked(small_, missing_bytes) ==
                                  0) {
      return nullptr;
    }
    block = heap.allocate_unused(bytes, owner);
  }
  return block;
}

void CachingPool::free_pending_locked() {
  for (const auto& clock : clocks_) {
    clock->poll();
  }
  const auto is_over = [this](const PendingFree& each) {
    return std::all_of(each.uses.begin(), each.uses.end(),
                       [this](const Use& use) { return use.tick <= clock_of(use.owner).done(); });
  };
  for (size_t index = 0; index < pending_.size();) {
    PendingFree& each = pending_[index];
    if (!is_over(each)) {
      ++index;
      continue;
    }
    stats_.pending_bytes -= each.block->bytes;
    each.heap->free(each.block, each.tick);
    std::swap(each, pending_.back());
    pending_.pop_back();
  }
}

void CachingPool::share_done_locked() {
  for (size_t index = 0; index < clocks_.size(); ++index) {
    clocks_[index]->catch_up();
    for (Heap* heap : {&small_, &large_}) {
      heap->disown(static_cast<Heap::Owner>(index), clocks_[index]->done());
    }
  }
}

// pre: share_done_locked() has just marked what is not over.
void CachingPool::take_from_others_locked(Heap& heap, Heap::Owner owner) {
  StreamClock& own = clock_of(owner);
  for (const auto& clock : clocks_) {
    if (clock.get() != &own) {
      clock->make_wait(own.stream());
    }
  }
  // As if this stream had used it all just now. The mark lies behind the waits.
  heap.adopt(owner, own.mark());
}

void CachingPool::synchronize_locked() {
  for (const auto& clock : clocks_) {
    clock->synchronize();
  }
  free_pending_locked();
  share_done_locked();
}

void CachingPool::synchronize_device_locked() {
  device_->synchronize_all();
  for (const auto& clock : clocks_) {
    clock->note_idle();
  }
  free_pending_locked();
  share_done_locked();
}

Heap::Block* CachingPool::grow_locked(Heap& heap, int64_t bytes, Heap::Owner owner) {
  for (;;) {
    const int64_t missing_bytes = try_grow_locked(heap, bytes, owner);
    if (missing_bytes == 0) {
      return heap.allocate(bytes, owner);
    }
    // What is given back may be the free block beside the hole that was found: look anew.
    if (missing_bytes == kNoAddresses || give_back_locked(missing_bytes) == 0) {
      return nullptr;
    }
    // Another stream's block may be over since the last look, and fit.
    if (Heap::Block* block = heap.allocate(bytes, owner)) {
      return block;
    }
  }
}

// Maps what a block of `bytes` needs. Returns 0, how many bytes stand in the way, or kNoAddresses:
// more of them come from no page.
int64_t CachingPool::try_grow_locked(Heap& heap, int64_t bytes, Heap::Owner owner) {
  const int64_t page_bytes = pages_->granularity_bytes();
  const int64_t range_bytes = pages_->range_bytes(bytes);
  auto hole = heap.find_hole(bytes, owner, page_bytes);
  if (!hole && pages_->is_sparse()) {
    if (!try_add_range_locked(heap, range_bytes)) {
      return kNoAddresses;
    }
    hole = heap.find_hole(bytes, owner, page_bytes);
  }
  const int64_t map_bytes = hole ? hole->bytes : range_bytes;
  const int64_t over_bytes = reserved_bytes_locked() + map_bytes - limit_bytes_;
  if (over_bytes > 0) {
    refusal_.clear();
    return over_bytes;
  }
  if (!hole && try_add_range_locked(heap, range_bytes)) {  // memory comes with its addresses
    hole = heap.find_hole(bytes, owner, range_bytes);
  }
  return hole && try_map_locked(heap, *hole, owner) ? 0 : map_bytes;
}

bool CachingPool::try_add_range_locked(Heap& heap, int64_t bytes) {
  try {
    heap.add_range(pages_->reserve(bytes), bytes);
    return true;
  } catch (const OutOfMemory& error) {
    refusal_ = error.what();
    return false;
  }
}

bool CachingPool::try_map_locked(Heap& heap, const Heap::Span& span, Heap::Owner owner) {
  try {
    pages_->map(span.address, span.bytes);
  } catch (const OutOfMemory& error) {
    refusal_ = error.what();
    return false;
  }
  heap.map(span, owner);
  ++stats_.num_maps;
  stats_.peak_reserved_bytes = std::max(stats_.peak_reserved_bytes, reserved_bytes_locked());
  return true;
}

int64_t CachingPool::give_back_locked(int64_t at_least_bytes) {
  if (at_least_bytes <= 0) {
    return 0;
  }
  free_pending_locked();
  share_done_locked();  // and so merged: a page may hold the last bytes of several streams
  const int64_t wanted_bytes = std::min(at_least_bytes, reserved_bytes_locked());
  const int64_t given_bytes = give_back_from_locked(large_, wanted_bytes);
  return given_bytes + give_back_from_locked(small_, wanted_bytes - given_bytes);
}

int64_t CachingPool::give_back_from_locked(Heap& heap, int64_t at_least_bytes) {
  const bool is_sparse = pages_->is_sparse();
  const int64_t page_bytes = pages_->granularity_bytes();
  int64_t given_bytes = 0;
  for (Heap::Span span :
       is_sparse ? heap.whole_pages(page_bytes) : heap.whole_ranges(Heap::kAnyone)) {
    if (given_bytes >= at_least_bytes) {
      break;
    }
    const PageRange whole = pages_->whole(span.address, span.bytes, at_least_bytes - given_bytes);
    if (whole.bytes == 0) {
      continue;
    }
    span.address = whole.address;
    span.bytes = whole.bytes;
    pages_->unmap(span.address, span.bytes);
    heap.unmap(span);
    if (!is_sparse) {
      pages_->release(span.address, span.bytes);
      heap.remove_range(span.address);
    }
    given_bytes += span.bytes;
  }
  return given_bytes;
}

}  // namespace blockswap
