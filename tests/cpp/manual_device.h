#pragma once

// A device whose work is done when the test says so, and pages that remember. Both know enough to
// say whether memory could still be in use: each piece of work has a number in its stream, and each
// stream knows up to which number it is ordered behind every other.

#include <algorithm>
#include <functional>
#include <map>
#include <new>
#include <set>
#include <string>
#include <vector>

#include "../../csrc/device/pages.h"
#include "../../csrc/error.h"
#include "check.h"

namespace blockswap::test {

class ManualDevice final : public Device {
 public:
  using Clock = std::vector<int64_t>;  // per stream: a number of work
  static constexpr size_t kStreams = 4;

  // Work that takes until finish(). Returns its number.
  int64_t enqueue(Stream stream) {
    Clock& knows = knows_[index(stream)];
    ++knows[index(stream)];
    needs_[index(stream)].push_back(knows);
    return knows[index(stream)];
  }
  // All work of the stream up to that number is done, and so is what it had to wait for.
  void finish(Stream stream, int64_t number) { reach(needs_[index(stream)].at(number - 1)); }
  void finish_all() {
    for (const Clock& knows : knows_) reach(knows);
  }
  bool is_over(Stream stream, int64_t number) const { return done_[index(stream)] >= number; }
  // What is enqueued on `later` from now on begins after that work.
  bool is_ordered(Stream later, Stream stream, int64_t number) const {
    return knows_[index(later)][index(stream)] >= number;
  }
  int64_t num_calls() const { return num_calls_; }
  int64_t num_waits() const { return num_waits_; }
  int64_t num_synchronized() const { return num_synchronized_; }
  size_t num_events() const { return events_.size(); }
  int64_t live_bytes() const { return live_bytes_; }
  // Its owner destroys the stream. What it has enqueued goes on.
  void destroy_under_the_pool(Stream stream) { dead_.insert(stream); }
  // Its owner makes a new one, which gets the same handle.
  void make_anew(Stream stream) { dead_.erase(stream); }
  // A real driver tells of a destroyed stream once, if ever; the next call may crash it.
  int num_calls_on_dead() const { return num_calls_on_dead_; }
  // That call from now on which may fail does; 0 = none.
  void fail_at(int64_t call) { fail_at_ = call; }
  // All calls fail for a reason that no driver has.
  void fail_with_bad_alloc() { has_no_memory_ = true; }

  void* allocate(int64_t bytes) override {
    may_fail("allocate");
    void* address = std::aligned_alloc(512, static_cast<size_t>(bytes));
    sizes_[address] = bytes;
    live_bytes_ += bytes;
    return address;
  }
  void deallocate(void* address) noexcept override {
    live_bytes_ -= sizes_.at(address);
    sizes_.erase(address);
    std::free(address);
  }
  Stream make_stream() override { return Stream{0}; }
  void destroy_stream(Stream) noexcept override {}
  Event make_event(EventKind) override {
    may_fail("make_event");
    events_[++last_event_] = Clock(kStreams, 0);
    return Event{last_event_};
  }
  void destroy_event(Event event) noexcept override { events_.erase(static_cast<uint64_t>(event)); }
  void record(Event event, Stream stream) override {
    may_fail("record");
    check_alive(stream);
    clock(event) = knows_[index(stream)];
  }
  void wait(Stream stream, Event event) override {
    may_fail("wait");
    check_alive(stream);
    ++num_waits_;
    for (size_t i = 0; i < kStreams; ++i) {
      knows_[index(stream)][i] = std::max(knows_[index(stream)][i], clock(event)[i]);
    }
  }
  bool is_done(Event event) override {
    may_fail("is_done");
    return is_reached(clock(event));
  }
  // Of a stream's own work only: nobody promises that a mere wait counts as work.
  bool is_idle(Stream stream) override {
    may_fail("is_idle");
    check_alive(stream);
    return is_over(stream, knows_[index(stream)][index(stream)]);
  }
  double seconds_between(Event, Event) override { return 0.0; }
  void synchronize(Stream stream) override {
    may_fail("synchronize");
    check_alive(stream);
    ++num_synchronized_;
    reach(knows_[index(stream)]);
  }
  void synchronize(Event event) override {
    may_fail("synchronize");
    ++num_synchronized_;
    reach(clock(event));
  }
  void synchronize_all() override {
    may_fail("synchronize_all");
    ++num_synchronized_;
    finish_all();
  }
  void enqueue_copy(Stream, void*, const void*, int64_t) override {}
  void enqueue_fill(Stream, void*, uint8_t, int64_t) override {}
  bool pin(void*, int64_t) override { return true; }
  void unpin(void*) noexcept override {}

  void may_fail(const char* call) {
    ++num_calls_;
    if (has_no_memory_) throw std::bad_alloc();
    if (fail_at_ > 0 && --fail_at_ == 0) throw DeviceError(std::string(call) + " failed");
  }

 private:
  static size_t index(Stream stream) { return static_cast<size_t>(stream); }
  void check_alive(Stream stream) {
    if (dead_.count(stream) == 0) return;
    ++num_calls_on_dead_;
    throw DeadStream("this stream was destroyed");
  }
  Clock& clock(Event event) { return events_.at(static_cast<uint64_t>(event)); }
  bool is_reached(const Clock& clock) const {
    return std::equal(clock.begin(), clock.end(), done_.begin(), std::less_equal<>());
  }
  void reach(const Clock& clock) {
    for (size_t i = 0; i < kStreams; ++i) done_[i] = std::max(done_[i], clock[i]);
  }

  Clock done_ = Clock(kStreams, 0);
  std::vector<Clock> knows_ = std::vector<Clock>(kStreams, Clock(kStreams, 0));
  std::vector<std::vector<Clock>> needs_ = std::vector<std::vector<Clock>>(kStreams);
  std::map<uint64_t, Clock> events_;
  std::map<void*, int64_t> sizes_;
  std::set<Stream> dead_;
  int num_calls_on_dead_ = 0;
  uint64_t last_event_ = 0;
  bool has_no_memory_ = false;
  int64_t live_bytes_ = 0, fail_at_ = 0, num_calls_ = 0, num_waits_ = 0, num_synchronized_ = 0;
};

// Who used which memory last, in units of 512 bytes.
class Uses {
 public:
  explicit Uses(const ManualDevice& device) : device_(device) {}

  void note(const void* address, int64_t bytes, Device::Stream stream, int64_t number) {
    each(address, bytes, [&](auto& unit) { unit[stream] = number; });
  }
  // New work of `stream` may touch it.
  bool may_use(const void* address, int64_t bytes, Device::Stream stream) {
    bool safe = true;
    each(address, bytes, [&](auto& unit) {
      for (const auto& [user, number] : unit) {
        safe = safe && (device_.is_over(user, number) || device_.is_ordered(stream, user, number));
      }
    });
    return safe;
  }
  // It may be taken from the device.
  bool is_over(const void* address, int64_t bytes) {
    bool over = true;
    each(address, bytes, [&](auto& unit) {
      for (const auto& [user, number] : unit) over = over && device_.is_over(user, number);
      unit.clear();
    });
    return over;
  }

 private:
  using Unit = std::map<Device::Stream, int64_t>;
  template <typename Visit>
  void each(const void* address, int64_t bytes, const Visit& visit) {
    const auto begin = reinterpret_cast<uint64_t>(address);
    for (uint64_t at = begin; at < begin + static_cast<uint64_t>(bytes); at += 512) {
      visit(units_[at]);
    }
  }
  const ManualDevice& device_;
  std::map<uint64_t, Unit> units_;
};

// Host pages that fail on demand and check every call against what is mapped and in use.
class WatchedPages final : public Pages {
 public:
  struct Shared {
    explicit Shared(ManualDevice& d) : device(d), uses(d) {}
    ManualDevice& device;
    Uses uses;
    std::map<uint64_t, int64_t> ranges;
    std::set<uint64_t> mapped;
    bool refuse_ranges = false;
    bool breaks = false;
  };
  WatchedPages(std::shared_ptr<Shared> shared, int64_t limit_bytes, int64_t page_bytes,
               int64_t batch_bytes)
      : shared_(std::move(shared)), pages_(make_host_pages(limit_bytes, page_bytes, batch_bytes)) {}

  int64_t granularity_bytes() const override { return pages_->granularity_bytes(); }
  bool is_sparse() const override { return true; }
  int64_t total_bytes() const override { return pages_->total_bytes(); }
  int64_t range_bytes(int64_t bytes) const override { return pages_->range_bytes(bytes); }
  uint64_t reserve(int64_t bytes) override {
    shared_->device.may_fail("reserve");
    if (shared_->refuse_ranges) throw OutOfMemory("no range");
    const uint64_t address = pages_->reserve(bytes);
    shared_->ranges[address] = bytes;
    return address;
  }
  void release(uint64_t address, int64_t bytes) noexcept override {
    CHECK(shared_->ranges[address] == bytes);
    shared_->ranges.erase(address);
    pages_->release(address, bytes);
  }
  void map(uint64_t address, int64_t bytes) override {
    shared_->device.may_fail("map");
    if (shared_->breaks) throw DeviceError("the driver is broken");
    pages_->map(address, bytes);
    each_page(address, bytes, [&](uint64_t page) { CHECK(shared_->mapped.insert(page).second); });
  }
  void unmap(uint64_t address, int64_t bytes) noexcept override {
    CHECK(shared_->uses.is_over(reinterpret_cast<void*>(address), bytes));
    each_page(address, bytes, [&](uint64_t page) { CHECK(shared_->mapped.erase(page) == 1); });
    const PageRange whole = pages_->whole(address, bytes, bytes);
    CHECK(whole.address == address && whole.bytes == bytes);
    pages_->unmap(address, bytes);
  }
  PageRange whole(uint64_t address, int64_t bytes, int64_t at_least_bytes) const override {
    return pages_->whole(address, bytes, at_least_bytes);
  }

 private:
  template <typename Visit>
  void each_page(uint64_t address, int64_t bytes, const Visit& visit) {
    const auto unit = static_cast<uint64_t>(granularity_bytes());
    CHECK(address % unit == 0 && bytes % granularity_bytes() == 0);
    for (uint64_t at = address; at < address + static_cast<uint64_t>(bytes); at += unit) visit(at);
  }
  std::shared_ptr<Shared> shared_;
  std::unique_ptr<Pages> pages_;
};

}  // namespace blockswap::test
