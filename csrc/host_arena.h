#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <mutex>
#include <vector>

namespace blockswap {

// How host memory is registered with the device's driver. `pin` returns false when the driver
// refuses; `unpin` must not throw. Both may be called on any thread, one call at a time.
struct PinCalls {
  std::function<bool(void* address, int64_t bytes)> pin;
  std::function<void(void* address)> unpin;
};

// Where images lie in an arena. The arena is registered chunk by chunk; chunks begin at pages, no
// image crosses a border between chunks, no page belongs to two of them.
struct ArenaLayout {
  std::vector<int64_t> image_offsets;  // multiples of kAlignment, ascending
  std::vector<int64_t> chunk_offsets;  // multiples of a page, ascending, the first is 0
  int64_t bytes = 0;                   // end of the last image
};

// The host memory that holds all weight images: exact size, huge pages, registered by chunks.
// Owns one reservation of anonymous memory; nothing physical is taken before fill() or a write.
// Whoever keeps a pointer into it (tensors' storages) holds a shared_ptr to the arena.
// Threads: all methods are safe to call at once. Two ranges being filled must not overlap; pin,
// pin_range and unpin wait for each other and may be slow (the driver's unregistering waits for
// running kernels); release never waits for them.
// Invariant: a released byte's page goes back once all bytes of the page are released and no
// device holds its chunk.
class HostArena {
 public:
  // Bytes to be copied in. `safe` runs once, on a worker, when all bytes are in place, and is then
  // destroyed with what it captured: drop the source there. It may be empty.
  struct Copy {
    const void* source = nullptr;
    int64_t offset = 0;  // in the arena
    int64_t bytes = 0;
    std::function<void()> safe;
    bool finished = false;  // set by fill; a finished copy is skipped
  };
  // Told the bytes copied by this call of fill; false cancels it.
  using Progress = std::function<bool(int64_t bytes_done)>;

  // Places images in order, in chunks of at most chunk_bytes (an image larger than that gets its
  // own). Each image's size is rounded up to kAlignment; a chunk ends with less than a page of
  // padding. PURE, apart from the page size.
  static ArenaLayout make_layout(const std::vector<int64_t>& image_bytes,
                                 int64_t chunk_bytes = int64_t{1} << 30);

  // min(16, usable cores): more threads do not copy faster.
  static int default_num_threads();

  // Throws ConfigError naming the bytes when the system refuses them.
  explicit HostArena(int64_t bytes, std::vector<int64_t> chunk_offsets = {0});
  explicit HostArena(const ArenaLayout& layout) : HostArena(layout.bytes, layout.chunk_offsets) {}
  // Unpins, unless the process is exiting.
  ~HostArena();
  HostArena(const HostArena&) = delete;
  HostArena& operator=(const HostArena&) = delete;

  uint8_t* data() const { return base_; }
  int64_t bytes() const { return bytes_; }
  const std::vector<int64_t>& chunk_offsets() const { return chunk_offsets_; }
  // End of the chunk that holds `offset`: an asynchronous copy must not read across it.
  int64_t chunk_end(int64_t offset) const;

  // Copies all of `copies` in, in order, on num_threads workers (0 = default_num_threads()), and
  // returns when they have ended. Sources not yet dropped never pass ahead_bytes (or one copy, when
  // that is larger); 0 = 32 MiB per thread or 1 % of all bytes, whichever is more.
  // `progress` runs on the calling thread about every 50 ms, and once at the end.
  // With `pin`, each chunk is registered, on a further thread, as soon as no unfinished copy of
  // this call touches it, so a call should bring all of a chunk.
  // Returns true when all copies are finished. Cancelled, or after an exception from safe, progress
  // or pin (rethrown), a copy is either finished (bytes whole, safe has run) or untouched, and
  // fill(copies) goes on where it ended; chunks left unpinned are for pin().
  // Throws UseError before any byte moves when copies overlap or leave the arena.
  bool fill(std::vector<Copy>& copies, int num_threads = 0, const Progress& progress = {},
            const PinCalls& pin = {}, int64_t ahead_bytes = 0);

  // Registers all chunks that are not; a chunk that the driver refuses stays pageable, and counts
  // so. Returns true when the whole arena is pinned.
  bool pin(const PinCalls& calls);
  // The same for the chunks that lie wholly inside the range; true when those are pinned.
  bool pin_range(const PinCalls& calls, int64_t offset, int64_t bytes);
  // Ends all registrations, with the calls that made them. No copy may be in flight.
  void unpin();
  // The same for the last chunk that is registered; its bytes, 0 when none is.
  int64_t unpin_last();
  bool is_pinned(int64_t offset, int64_t bytes) const;
  int64_t pinned_bytes() const;
  int64_t pageable_bytes() const { return bytes_ - pinned_bytes(); }

  // Nobody will read or write these bytes again; `bytes` is rounded up to kAlignment.
  void release(int64_t offset, int64_t bytes);

  // Bytes of the arena in physical memory: exact, reads the page tables.
  int64_t resident_bytes() const;

 private:
  struct Chunk {
    bool held = false;  // a device may hold its pages: from before pin until after unpin
    bool pinned = false;
    std::function<void(void*)> unpin;
  };

  void check_range(int64_t offset, int64_t bytes, const char* verb) const;
  size_t chunk_at(int64_t offset) const;
  bool pin_chunk(const PinCalls& calls, size_t chunk);
  int64_t unpin_chunk(size_t chunk);
  void let_go(size_t chunk);
  void discard_locked(int64_t begin, int64_t end);

  int64_t bytes_ = 0;
  int64_t mapped_bytes_ = 0;  // bytes_ in whole pages
  std::vector<int64_t> chunk_offsets_;
  uint8_t* base_ = nullptr;
  std::mutex pin_mutex_;      // held through driver calls; taken before mutex_, never after
  mutable std::mutex mutex_;  // guards what follows
  std::vector<Chunk> chunks_;
  std::map<int64_t, int64_t> released_;  // begin -> end; apart from each other
};

}  // namespace blockswap
