// The CPU as its own accelerator: no streams, every call is complete when it returns. Lets whole
// sessions run anywhere; shows no race, which is what the fake accelerator is for.

#include <chrono>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <unordered_map>

#include "../error.h"
#include "device.h"

namespace blockswap {
namespace {

class CpuDevice final : public Device {
 public:
  void* allocate(int64_t bytes) override {
    constexpr size_t kLine = 256;
    const size_t rounded = (static_cast<size_t>(bytes) + kLine - 1) / kLine * kLine;
    void* address = std::aligned_alloc(kLine, rounded == 0 ? kLine : rounded);
    if (address == nullptr) {
      throw OutOfMemory("the CPU has no " + format_bytes(bytes) + " free for residents and ring");
    }
    return address;
  }
  void deallocate(void* address) noexcept override { std::free(address); }

  Stream make_stream() override { return Stream{0}; }
  void destroy_stream(Stream) noexcept override {}

  Event make_event(EventKind) override {
    times_.emplace(++last_event_, NAN);
    return Event{last_event_};
  }
  void destroy_event(Event event) noexcept override { times_.erase(static_cast<uint64_t>(event)); }
  void record(Event event, Stream) override {
    const auto now = std::chrono::steady_clock::now().time_since_epoch();
    times_.at(static_cast<uint64_t>(event)) = std::chrono::duration<double>(now).count();
  }
  void wait(Stream, Event) override {}
  bool is_done(Event) override { return true; }
  bool is_idle(Stream) override { return true; }
  double seconds_between(Event begin, Event end) override {
    return times_.at(static_cast<uint64_t>(end)) - times_.at(static_cast<uint64_t>(begin));
  }
  void synchronize(Stream) override {}
  void synchronize(Event) override {}
  void synchronize_all() override {}

  void enqueue_copy(Stream, void* target, const void* host, int64_t bytes) override {
    std::memcpy(target, host, static_cast<size_t>(bytes));
  }
  void enqueue_fill(Stream, void* target, uint8_t value, int64_t bytes) override {
    std::memset(target, value, static_cast<size_t>(bytes));
  }
  bool pin(void*, int64_t) override { return true; }
  void unpin(void*) noexcept override {}

 private:
  std::unordered_map<uint64_t, double> times_;
  uint64_t last_event_ = 0;
};

}  // namespace

std::shared_ptr<Device> make_cpu_device() { return std::make_shared<CpuDevice>(); }

}  // namespace blockswap
