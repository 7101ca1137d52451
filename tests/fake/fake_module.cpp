// Python face of the fake accelerator: numbers in, numbers out. __init__.py gives it names and
// types.

#include "fake_fallback.h"
#include "fake_memory.h"
#include "fake_streams.h"

#include <c10/util/Exception.h>
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

namespace py = pybind11;

namespace {

void set_random_delays(uint64_t seed, double max_seconds) {
  fake::delays().random_seed = seed;
  fake::delays().random_max_seconds = max_seconds;
  ++fake::delays().random_generation;
}

// The callback's last owner may be a thread without the GIL: the deleter takes it.
void set_out_of_memory_callback(const py::object& callable) {
  if (callable.is_none()) {
    fake::set_out_of_memory_callback(nullptr);
    return;
  }
  auto* owned = new py::object(callable);
  std::shared_ptr<py::object> shared(owned, [](py::object* object) {
    py::gil_scoped_acquire gil;
    delete object;
  });
  fake::set_out_of_memory_callback([shared](int device, size_t bytes) {
    py::gil_scoped_acquire gil;
    return py::cast<bool>((*shared)(device, bytes));
  });
}

void attach_out_of_memory_observer(const py::object& callable) {
  auto* owned = new py::object(callable);  // stays
  fake::attach_out_of_memory_observer(
      [owned](int device, size_t bytes, const fake::MemoryUse& use) {
        py::gil_scoped_acquire gil;
        const int64_t allowed = std::min(use.limit_bytes, use.share_bytes);
        (*owned)(device, bytes, allowed, use.limit_bytes - use.reserved_bytes);
      });
}

// As a library does that can do with less: whether there was memory.
bool try_workspace(size_t bytes) {
  try {
    fake::device_allocator()->raw_deallocate(fake::device_allocator()->raw_allocate(bytes));
    return true;
  } catch (const c10::OutOfMemoryError&) {
    return false;
  }
}

// For C++ callers: the address of a `bool callback()`, told no size, as c10::FreeMemoryCallback is.
void set_out_of_memory_function(uintptr_t address) {
  auto* function = reinterpret_cast<bool (*)()>(address);
  fake::set_out_of_memory_callback([function](int, size_t) { return function(); });
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.attr("num_devices") = fake::kNumDevices;
  m.attr("num_streams") = fake::kNumStreams;
  m.attr("default_limit_bytes") = fake::kDefaultLimitBytes;

  m.def("current_device", &fake::current_device);
  m.def("set_device", &fake::set_current_device);
  m.def("synchronize", &fake::synchronize_device);
  m.def("current_stream", &fake::current_stream);
  m.def("set_stream", &fake::set_current_stream);

  py::class_<fake::MemoryUse>(m, "MemoryUse")
      .def_readonly("used_bytes", &fake::MemoryUse::used_bytes)
      .def_readonly("peak_bytes", &fake::MemoryUse::peak_bytes)
      .def_readonly("reserved_bytes", &fake::MemoryUse::reserved_bytes)
      .def_readonly("peak_reserved_bytes", &fake::MemoryUse::peak_reserved_bytes)
      .def_readonly("limit_bytes", &fake::MemoryUse::limit_bytes)
      .def_readonly("num_retries", &fake::MemoryUse::num_retries)
      .def_readonly("num_ooms", &fake::MemoryUse::num_ooms);
  m.def("memory_use", &fake::memory_use);
  m.def("keep_freed", &fake::keep_freed);
  m.def("empty_cache", &fake::empty_cache);
  m.def("cached_pieces", [](int device) {
    std::vector<std::tuple<uint64_t, uint64_t, size_t, bool>> result;
    for (const auto& [place, piece] : fake::cached_pieces(device)) {
      result.emplace_back(piece.segment, place, piece.bytes, piece.is_free);
    }
    return result;
  });
  m.def("reset_peak", &fake::reset_peak);
  m.def("set_limit", &fake::set_limit);
  m.def("set_share", &fake::set_share);
  m.def("num_allocations", &fake::num_allocations);
  m.def("fail_allocation", &fake::fail_allocation);
  m.def("writes_after_free", &fake::num_writes_after_free);
  m.def("set_oom_callback", &set_out_of_memory_callback);
  m.def("attach_out_of_memory_observer", &attach_out_of_memory_observer);
  m.def("try_workspace", &try_workspace);
  m.def("set_oom_function", &set_out_of_memory_function);

  m.def("set_copy_delay", [](double seconds_per_byte, double seconds_per_copy) {
    fake::delays().copy_seconds_per_byte = seconds_per_byte;
    fake::delays().copy_seconds_per_copy = seconds_per_copy;
  });
  m.def("set_body_delay", [](double seconds) { fake::delays().body_seconds = seconds; });
  m.def("set_random_delays", &set_random_delays);

  m.def("sync_fallbacks", [] {
    std::map<std::string, std::pair<int64_t, std::string>> result;
    for (const auto& [name, entry] : fake::sync_fallbacks()) {
      result[name] = {entry.num_calls, entry.reason};
    }
    return result;
  });
  m.def("clear_sync_fallbacks", &fake::clear_sync_fallbacks);
}
