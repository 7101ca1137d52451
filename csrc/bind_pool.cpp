// Python's face of the caching pool: unpacks and calls, decides nothing.

#include <ATen/ops/from_blob.h>
#include <pybind11/functional.h>
#include <pybind11/stl.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include <utility>

#include "bindings.h"
#include "device/caching_pool.h"
#include "error.h"
#include "os.h"
#include "torch_allocator.h"

namespace py = pybind11;
using namespace py::literals;

namespace blockswap {
namespace {

using NoGil = py::call_guard<py::gil_scoped_release>;

// Python's handle of pages that no pool owns yet.
struct LoosePages {
  std::unique_ptr<Pages> pages;

  std::unique_ptr<Pages> take() {
    if (pages == nullptr) {
      throw UseError("these pages belong to a pool already: make new ones for another pool");
    }
    return std::move(pages);
  }
};

std::optional<LoosePages> make_loose_gpu_pages([[maybe_unused]] int index,
                                               [[maybe_unused]] int64_t page_bytes) {
#if BS_WITH_GPU
  std::unique_ptr<Pages> pages = make_gpu_pages(index, page_bytes);
  return pages ? std::optional<LoosePages>(LoosePages{std::move(pages)}) : std::nullopt;
#else
  throw DeviceError("this build of blockswap has no GPU support: use make_host_pages");
#endif
}

void* pointer_to(uint64_t address) { return reinterpret_cast<void*>(address); }

constexpr const char* kCallback = "_on_pressure";

// Python's handle of the pool owns the callback, and the pool knows only the handle, weakly: so
// Python's collector sees a callback that names its pool. Called on any thread, without the pool's
// mutex; a pool whose handle is gone has nobody to ask.
CachingPool::Pressure pressure_through(const py::object& handle) {
  const std::shared_ptr<py::weakref> shared(new py::weakref(handle), [](py::weakref* weak) {
    py::gil_scoped_acquire gil;
    delete weak;
  });
  return [shared](int64_t bytes) {
    py::gil_scoped_acquire gil;
    const py::object pool = (*shared)();
    return !pool.is_none() && py::cast<bool>(pool.attr(kCallback)(bytes));
  };
}

void set_on_pressure(const py::object& handle, const py::object& callback) {
  auto& pool = py::cast<CachingPool&>(handle);
  if (is_pluggable(pool)) {
    throw UseError(
        "a pool that serves PyTorch asks no Python callback: PyTorch holds its allocator's lock, "
        "and "
        "a thread that holds Python's may wait for that");
  }
  CachingPool::Pressure pressure;
  if (!callback.is_none()) {
    pressure = pressure_through(handle);
  }
  const py::object old = py::getattr(handle, kCallback, py::none());  // dies after all this
  handle.attr(kCallback) = callback;
  py::gil_scoped_release no_gil;
  pool.set_on_pressure(std::move(pressure));
}

// The names are those of torch.cuda.memory._snapshot(), which torch's memory visualiser reads.
py::dict block_as_torch_shows_it(const PoolBlock& block) {
  const char* state = block.state == PoolBlock::State::kAllocated     ? "active_allocated"
                      : block.state == PoolBlock::State::kPendingFree ? "active_pending_free"
                                                                      : "inactive";
  return py::dict("address"_a = block.address, "size"_a = block.bytes,
                  "requested_size"_a = block.bytes, "state"_a = state, "frames"_a = py::list());
}

py::dict segment_as_torch_shows_it(const PoolSegment& segment, int device) {
  int64_t total_bytes = 0;
  int64_t allocated_bytes = 0;
  int64_t active_bytes = 0;
  py::list blocks;
  for (const PoolBlock& block : segment.blocks) {
    total_bytes += block.bytes;
    allocated_bytes += block.state == PoolBlock::State::kAllocated ? block.bytes : 0;
    active_bytes += block.state != PoolBlock::State::kInactive ? block.bytes : 0;
    blocks.append(block_as_torch_shows_it(block));
  }
  // Torch knows one stream per segment; ours may hold blocks of several.
  return py::dict("device"_a = device, "address"_a = segment.blocks.front().address,
                  "total_size"_a = total_bytes, "allocated_size"_a = allocated_bytes,
                  "active_size"_a = active_bytes, "requested_size"_a = allocated_bytes,
                  "stream"_a = static_cast<uint64_t>(segment.blocks.front().stream),
                  "segment_type"_a = segment.is_small ? "small" : "large",
                  "segment_pool_id"_a = py::make_tuple(0, 0), "is_expandable"_a = true,
                  "frames"_a = py::list(), "blocks"_a = blocks);
}

py::dict snapshot_as_torch_shows_it(const CachingPool& pool, int device) {
  py::list segments;
  for (const PoolSegment& segment : pool.snapshot()) {
    segments.append(segment_as_torch_shows_it(segment, device));
  }
  return py::dict("segments"_a = segments, "device_traces"_a = py::list(),
                  "allocator_settings"_a = py::dict());
}

void bind_stats(py::module_& m) {
  py::class_<PoolStats>(m, "PoolStats")
      .def_readonly("allocated_bytes", &PoolStats::allocated_bytes)
      .def_readonly("pending_bytes", &PoolStats::pending_bytes)
      .def_readonly("reserved_bytes", &PoolStats::reserved_bytes)
      .def_readonly("peak_allocated_bytes", &PoolStats::peak_allocated_bytes)
      .def_readonly("peak_reserved_bytes", &PoolStats::peak_reserved_bytes)
      .def_readonly("num_allocations", &PoolStats::num_allocations)
      .def_readonly("num_frees", &PoolStats::num_frees)
      .def_readonly("num_splits", &PoolStats::num_splits)
      .def_readonly("num_maps", &PoolStats::num_maps)
      .def_readonly("num_retries", &PoolStats::num_retries)
      .def_readonly("num_ooms", &PoolStats::num_ooms);
  m.attr("PoolStats").attr("FIELDS") =
      py::make_tuple("allocated_bytes", "pending_bytes", "reserved_bytes", "peak_allocated_bytes",
                     "peak_reserved_bytes", "num_allocations", "num_frees", "num_splits",
                     "num_maps", "num_retries", "num_ooms");
}

void bind_caching_pool(py::module_& m) {
  py::class_<CachingPool, std::shared_ptr<CachingPool>>(m, "CachingPool", py::dynamic_attr())
      .def(py::init([](std::shared_ptr<Device> device, LoosePages& pages, int64_t limit_bytes,
                       bool check) {
             return std::make_shared<CachingPool>(std::move(device), pages.take(), limit_bytes,
                                                  check);
           }),
           "device"_a, "pages"_a, "limit_bytes"_a = CachingPool::kNoLimit, "check"_a = false)
      .def(
          "allocate",
          [](CachingPool& pool, int64_t bytes, uint64_t stream) {
            return reinterpret_cast<uint64_t>(pool.allocate(bytes, Device::Stream{stream}));
          },
          "bytes"_a, "stream"_a = 0, NoGil(), "The address of a block; `stream` is a cudaStream_t.")
      .def(
          "free",
          [](CachingPool& pool, uint64_t address, uint64_t stream) {
            pool.free(pointer_to(address), Device::Stream{stream});
          },
          "address"_a, "stream"_a = 0, NoGil())
      .def(
          "record_use",
          [](CachingPool& pool, uint64_t address, uint64_t stream) {
            pool.record_use(pointer_to(address), Device::Stream{stream});
          },
          "address"_a, "stream"_a, NoGil())
      .def("give_back", &CachingPool::give_back, "at_least_bytes"_a, NoGil())
      .def("trim", &CachingPool::trim, "keep_bytes"_a = 0, NoGil())
      .def("set_limit", &CachingPool::set_limit, "bytes"_a, NoGil())
      .def("set_on_pressure", &set_on_pressure, "callback"_a,
           "Called with bytes before memory is out; true: try again. None: no one.")
      .def("stats", &CachingPool::stats, NoGil())
      .def("reset_peaks", &CachingPool::reset_peaks, NoGil())
      .def("snapshot", &snapshot_as_torch_shows_it, "device"_a = 0,
           "What torch.cuda.memory._snapshot() would say of this pool.");
}

TorchStream torch_stream(uint64_t stream) { return reinterpret_cast<TorchStream>(stream); }

void bind_torch_allocator(py::module_& m) {
  m.def("pluggable_pool", &pluggable_pool, "device"_a, NoGil());
  m.def("set_pluggable_pool", &set_pluggable_pool, "device"_a, "pool"_a, NoGil());
  m.def("install_torch_allocator", &install_torch_allocator);
  m.def(
      "mem_pool_functions",
      [] {
        return py::make_tuple(reinterpret_cast<uint64_t>(&mem_pool_alloc),
                              reinterpret_cast<uint64_t>(&mem_pool_free));
      },
      "What torch._C._cuda_customAllocator asks for, for a MemPool.");

  // What PyTorch calls, with its translation of errors.
  m.def("torch_alloc",
        torch::wrap_pybind_function_no_gil([](uint64_t bytes, int device, uint64_t stream) {
          return reinterpret_cast<uint64_t>(torch_alloc(bytes, device, torch_stream(stream)));
        }));
  m.def("torch_free", torch::wrap_pybind_function_no_gil(
                          [](uint64_t address, uint64_t bytes, int device, uint64_t stream) {
                            torch_free(pointer_to(address), bytes, device, torch_stream(stream));
                          }));
  m.def("torch_record_stream",
        torch::wrap_pybind_function_no_gil([](uint64_t address, uint64_t stream) {
          torch_record_stream(pointer_to(address), torch_stream(stream));
        }));
  m.def("torch_empty_cache", torch::wrap_pybind_function_no_gil([] { torch_empty_cache(); }));
  m.def("torch_set_memory_fraction",
        torch::wrap_pybind_function_no_gil(
            [](double fraction, int device) { torch_set_memory_fraction(fraction, device); }));
  m.def("torch_refuse_graphs", torch::wrap_pybind_function_no_gil([] { torch_refuse_graphs(); }));
  m.def("mem_pool_alloc",
        torch::wrap_pybind_function_no_gil([](uint64_t bytes, int device, uint64_t stream) {
          return reinterpret_cast<uint64_t>(mem_pool_alloc(bytes, device, torch_stream(stream)));
        }));
  m.def("mem_pool_free", torch::wrap_pybind_function_no_gil([](uint64_t address, uint64_t bytes,
                                                               int device, uint64_t stream) {
          mem_pool_free(pointer_to(address), bytes, device, torch_stream(stream));
        }));
}

}  // namespace

void bind_pool(py::module_& m) {
  py::class_<LoosePages>(m, "Pages");
  m.def(
      "make_host_pages",
      [](int64_t limit_bytes, int64_t page_bytes) {
        return LoosePages{make_host_pages(limit_bytes, page_bytes)};
      },
      "limit_bytes"_a, "page_bytes"_a = os::kHugePageBytes,
      "Host memory that plays a device of that size.");
  m.def(
      "make_segment_pages",
      [](std::shared_ptr<Device> device) {
        return LoosePages{make_segment_pages(std::move(device))};
      },
      "device"_a, "For devices that cannot map pages.");
  m.def("make_gpu_pages", &make_loose_gpu_pages, "index"_a, "page_bytes"_a = 0,
        "None where the driver cannot map pages.");
  bind_stats(m);
  bind_caching_pool(m);
  m.def(
      "tensor_over",
      [](uint64_t address, int64_t bytes, const std::string& device) {
        const c10::Device where(device);
        return at::from_blob(
            pointer_to(address), {bytes}, /*deleter=*/[](void*) {},
            at::TensorOptions().dtype(at::kByte).device(where), where);
      },
      "address"_a, "bytes"_a, "device"_a, "A tensor of bytes that borrows the memory.");

  bind_torch_allocator(m);
}

}  // namespace blockswap
