// Replays allocations for benchmarks/allocator.py: from Python, the calls would cost more than what
// is measured.

#include <ATen/core/Tensor.h>
#include <c10/core/Allocator.h>
#include <c10/core/DeviceGuard.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/utils/pybind.h>

#include <chrono>
#include <iterator>
#include <map>
#include <vector>

#include "binding.h"
#include "bindings.h"
#include "device/caching_pool.h"
#include "error.h"

#if BS_WITH_GPU
#include <c10/cuda/CUDACachingAllocator.h>
#endif

namespace py = pybind11;
using namespace py::literals;

namespace blockswap {
namespace {

// Blocks in use, by address: none may reach into the next.
class Ledger {
 public:
  void add(void* address, int64_t bytes) {
    const auto begin = reinterpret_cast<uint64_t>(address);
    const auto next = ends_.lower_bound(begin);
    const uint64_t end = begin + static_cast<uint64_t>(bytes);
    if ((next != ends_.end() && next->first < end) ||
        (next != ends_.begin() && std::prev(next)->second > begin)) {
      throw UseError("a block of " + format_bytes(bytes) + " overlaps another one");
    }
    ends_.emplace_hint(next, begin, end);
  }
  void remove(void* address) { ends_.erase(reinterpret_cast<uint64_t>(address)); }

 private:
  std::map<uint64_t, uint64_t> ends_;
};

// Each row of the trace is (slot, bytes): a block for the slot or, with 0 bytes, its block freed.
template <typename Allocate, typename Free>
double replay(const at::Tensor& trace, int64_t repeats, bool check, const Allocate& allocate,
              const Free& free) {
  const auto rows = trace.accessor<int64_t, 2>();
  std::vector<void*> slots(static_cast<size_t>(trace.select(1, 0).max().item<int64_t>()) + 1);
  Ledger ledger;
  const auto begin = std::chrono::steady_clock::now();
  for (int64_t repeat = 0; repeat < repeats; ++repeat) {
    for (int64_t row = 0; row < rows.size(0); ++row) {
      void*& slot = slots[static_cast<size_t>(rows[row][0])];
      const int64_t bytes = rows[row][1];
      if (bytes > 0) {
        slot = allocate(bytes);
        if (check) ledger.add(slot, bytes);
      } else {
        if (check) ledger.remove(slot);
        free(slot);
      }
    }
  }
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

// The one in use: PyTorch's registry goes on to name its own once another one is plugged in.
c10::Allocator* allocator_of(c10::Device device) {
#if BS_WITH_GPU
  if (device.is_cuda()) {
    return c10::cuda::CUDACachingAllocator::get();
  }
#endif
  return c10::GetAllocator(device.type());
}

}  // namespace

void bind_replay(py::module_& m) {
  m.def(
      "replay_on_pool",
      [](const at::Tensor& trace, int64_t repeats, CachingPool& pool, const std::string& device,
         bool check) {
        const Device::Stream stream = current_stream(c10::Device(device));
        return replay(
            trace, repeats, check, [&](int64_t bytes) { return pool.allocate(bytes, stream); },
            [&](void* address) { pool.free(address, stream); });
      },
      "trace"_a, "repeats"_a, "pool"_a, "device"_a, "check"_a = false,
      py::call_guard<py::gil_scoped_release>(),
      "Seconds that a trace takes: int64 rows (slot, bytes), 0 bytes to free. `check` refuses "
      "blocks that overlap.");
  m.def(
      "replay_on_torch",
      [](const at::Tensor& trace, int64_t repeats, const std::string& device) {
        const c10::DeviceGuard guard{c10::Device(device)};
        c10::Allocator* allocator = allocator_of(c10::Device(device));
        return replay(
            trace, repeats, /*check=*/false,
            [=](int64_t bytes) { return allocator->raw_allocate(static_cast<size_t>(bytes)); },
            [=](void* address) { allocator->raw_deallocate(address); });
      },
      "trace"_a, "repeats"_a, "device"_a, py::call_guard<py::gil_scoped_release>(),
      "The same on PyTorch's allocator of the device.");
}

}  // namespace blockswap
