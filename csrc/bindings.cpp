// Python's face of the engine: unpacks and calls, decides nothing.

#include <pybind11/functional.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include "binding.h"
#include "bindings.h"
#include "device/pool.h"
#include "engine.h"
#include "error.h"
#include "pinner.h"
#include "watched.h"

namespace py = pybind11;
using namespace blockswap;

namespace {

// Our exceptions become the classes of blockswap.errors, so that Python code catches one family.
void register_errors() {
  py::register_exception_translator([](std::exception_ptr pending) {
    const auto raise = [](const char* name, const std::exception& error) {
      const py::object type = py::module_::import("blockswap.errors").attr(name);
      PyErr_SetString(type.ptr(), error.what());
    };
    try {
      if (pending) {
        std::rethrow_exception(pending);
      }
    } catch (const CapError& error) {
      raise("CapError", error);
    } catch (const ConfigError& error) {
      raise("ConfigError", error);
    } catch (const DeviceError& error) {
      raise("DeviceError", error);
    } catch (const UseError& error) {
      raise("UseError", error);
    }
  });
}

std::shared_ptr<Device> make_device(const std::string& type, int index) {
  if (type == "cpu") {
    return make_cpu_device();
  }
  if (type == "cuda") {
#ifdef BS_WITH_GPU
    return make_gpu_device(index);
#else
    throw DeviceError(
        "this build of blockswap has no GPU support: reinstall it beside a CUDA or ROCm build of "
        "PyTorch, or pass device=\"cpu\"");
#endif
  }
  return make_generic_device(type, index);
}

// Called on the thread that filled: takes the GIL, lets Ctrl-C through as "cancel".
HostArena::Progress progress_of(py::object callback) {
  auto shared = std::make_shared<py::object>(std::move(callback));
  return [shared](int64_t bytes) {
    py::gil_scoped_acquire gil;
    return py::cast<bool>((*shared)(bytes));
  };
}

void bind_memory(py::module_& m) {
  py::class_<Device, std::shared_ptr<Device>>(m, "Device");
  m.def("make_device", &make_device, py::arg("type"), py::arg("index"));

  py::class_<Pool>(m, "Pool")
      .def(py::init([](const std::string& type, int index, const std::shared_ptr<Device>& device) {
             return std::make_unique<Pool>(session_pool(type, index, device));
           }),
           py::arg("type"), py::arg("index"), py::arg("device"))
      .def(
          "allocate",
          [](Pool& pool, int64_t bytes, const at::Tensor& token) {
            return reinterpret_cast<uint64_t>(pool.allocate(bytes, current_stream(token.device())));
          },
          py::call_guard<py::gil_scoped_release>())
      .def(
          "free", [](Pool& pool, uint64_t address) { pool.free(reinterpret_cast<void*>(address)); },
          py::call_guard<py::gil_scoped_release>())
      .def("release", &Pool::release, py::call_guard<py::gil_scoped_release>())
      .def("give_back", &Pool::give_back, py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("bytes", &Pool::bytes)
      .def_property_readonly("page_bytes", &Pool::page_bytes)
      .def_property_readonly("unused_bytes", &Pool::unused_bytes);

  m.attr("LEAST_BOUNCE_BYTES") = BounceRing::kLeastBytes;
  py::class_<Pinner, std::shared_ptr<Pinner>>(m, "Pinner")
      .def(py::init<std::shared_ptr<Device>, int64_t>(), py::arg("device"),
           py::arg("limit_bytes") = Pinner::kNoLimit)
      .def_property_readonly("pinned_bytes", &Pinner::pinned_bytes)
      .def_property_readonly("was_refused", &Pinner::was_refused);

  py::class_<HostArena, std::shared_ptr<HostArena>>(m, "HostArena")
      .def(py::init<int64_t, std::vector<int64_t>>(), py::arg("bytes"),
           py::arg("chunk_offsets") = std::vector<int64_t>{0})
      .def_static(
          "make_layout",
          [](const std::vector<int64_t>& images, int64_t chunk_bytes) {
            const ArenaLayout layout = HostArena::make_layout(images, chunk_bytes);
            return py::make_tuple(layout.image_offsets, layout.chunk_offsets, layout.bytes);
          },
          py::arg("image_bytes"), py::arg("chunk_bytes") = int64_t{1} << 30)
      .def(
          "pin", [](HostArena& arena, Pinner& pinner) { return arena.pin(pinner.calls()); },
          py::call_guard<py::gil_scoped_release>())
      .def("unpin", &HostArena::unpin, py::call_guard<py::gil_scoped_release>())
      .def("unpin_last", &HostArena::unpin_last, py::call_guard<py::gil_scoped_release>())
      .def("chunk_end", &HostArena::chunk_end)
      .def("is_pinned", &HostArena::is_pinned, py::arg("offset"), py::arg("bytes"))
      .def("resident_bytes", &HostArena::resident_bytes)
      .def_property_readonly("pinned_bytes", &HostArena::pinned_bytes)
      .def_property_readonly("bytes", &HostArena::bytes)
      .def_property_readonly("address", [](const HostArena& arena) {
        return reinterpret_cast<uint64_t>(arena.data());
      });
}

// Its address and whether it is pinned.
HostImage image_of(const std::pair<uint64_t, bool>& image) {
  return {reinterpret_cast<const void*>(image.first), image.second};
}

void bind_engine(py::module_& m) {
  py::class_<Counters>(m, "Counters")
      .def_readonly("steps", &Counters::steps)
      .def_readonly("copies", &Counters::copies)
      .def_readonly("copied_bytes", &Counters::copied_bytes)
      .def_readonly("mispredicted", &Counters::mispredicted)
      .def_readonly("refetched", &Counters::refetched);
  py::class_<PieceTimes>(m, "PieceTimes")
      .def_readonly("piece", &PieceTimes::piece)
      .def_readonly("copy_begin", &PieceTimes::copy_begin)
      .def_readonly("copy_end", &PieceTimes::copy_end)
      .def_readonly("wait_begin", &PieceTimes::wait_begin)
      .def_readonly("wait_end", &PieceTimes::wait_end)
      .def_readonly("run_end", &PieceTimes::run_end);
  py::class_<StepTimes>(m, "StepTimes")
      .def_readonly("step_seconds", &StepTimes::step_seconds)
      .def_readonly("pieces", &StepTimes::pieces);
  py::class_<HostTimes>(m, "HostTimes")
      .def_readonly("step_seconds", &HostTimes::step_seconds)
      .def_readonly("seconds_per_piece", &HostTimes::seconds_per_piece)
      .def_readonly("measuring_seconds_per_piece", &HostTimes::measuring_seconds_per_piece)
      .def_readonly("issued", &HostTimes::issued)
      .def_readonly("waiting_seconds", &HostTimes::waiting_seconds)
      .def_readonly("waited", &HostTimes::waited);

  py::class_<Engine, std::shared_ptr<Engine>>(m, "Engine")
      .def(py::init([](const std::shared_ptr<Device>& device, int num_copy_streams, bool check) {
             EngineOptions options;
             options.num_copy_streams = num_copy_streams;
             options.check = check;
             return std::make_shared<Engine>(device, options);
           }),
           py::arg("device"), py::arg("num_copy_streams") = 1, py::arg("check") = false)
      .def("throttle", &Engine::throttle, py::arg("bytes_per_second"),
           py::arg("link_bytes_per_second"))
      .def("issue_on_thread", &Engine::issue_on_thread)
      .def_property_readonly("issues_on_thread", &Engine::issues_on_thread)
      .def(
          "bounce",
          [](Engine& engine, const std::shared_ptr<Device>& device, Pinner& pinner, int64_t bytes) {
            engine.bounce(BounceRing::make(device, pinner.calls(), bytes));
            return engine.bounce_bytes();
          },
          py::arg("device"), py::arg("pinner"), py::arg("bytes"),
          py::call_guard<py::gil_scoped_release>(),
          "Has a ring of that size at most, 0 to end it, carry pageable images; returns its size.")
      .def(
          "load",
          [](Engine& engine, const Plan& plan, const std::vector<std::pair<uint64_t, bool>>& images,
             uint64_t ring, const at::Tensor& token) {
            std::vector<HostImage> from;
            for (const auto& image : images) {
              from.push_back(image_of(image));
            }
            engine.load(plan, std::move(from), reinterpret_cast<void*>(ring),
                        current_stream(token.device()));
          })
      .def("stop", &Engine::stop, py::call_guard<py::gil_scoped_release>())
      .def("measure", &Engine::measure)
      .def("begin_step",
           [](Engine& engine, const at::Tensor& token, bool continues) {
             engine.begin_step(current_stream(token.device()), continues);
           })
      .def("end_step",
           [](Engine& engine, const at::Tensor& token) {
             engine.end_step(current_stream(token.device()));
           })
      .def("copy_fixed",
           [](Engine& engine, uint64_t target, const std::pair<uint64_t, bool>& image,
              int64_t bytes, const at::Tensor& token) {
             engine.copy_fixed(reinterpret_cast<void*>(target), image_of(image), bytes,
                               current_stream(token.device()));
           })
      .def("invalidate", &Engine::invalidate)
      .def("host_times", &Engine::host_times)
      .def("step_seconds", &Engine::step_seconds, py::call_guard<py::gil_scoped_release>())
      .def("step_times", &Engine::step_times, py::call_guard<py::gil_scoped_release>())
      .def(
          "measure_link",
          [](Engine& engine, const std::pair<uint64_t, bool>& image, uint64_t target, int64_t bytes,
             int repeats, const at::Tensor& token) {
            return engine.measure_link(image_of(image), reinterpret_cast<void*>(target), bytes,
                                       repeats, current_stream(token.device()));
          },
          py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("counters", &Engine::counters);
}

// Null while the object is being made or taken apart.
Binding* binding_in(PyObject* object) {
  auto* instance = reinterpret_cast<py::detail::instance*>(object);
  py::detail::value_and_holder held = instance->get_value_and_holder();
  return held.holder_constructed() ? held.value_ptr<Binding>() : nullptr;
}

void collect_binding(PyHeapTypeObject* heap_type) {
  PyTypeObject& type = heap_type->ht_type;
  type.tp_flags |= Py_TPFLAGS_HAVE_GC;
  type.tp_traverse = [](PyObject* self, visitproc visit, void* arg) {
    Py_VISIT(Py_TYPE(self));
    const Binding* binding = binding_in(self);
    return binding != nullptr ? binding->visit(visit, arg) : 0;
  };
  type.tp_clear = [](PyObject* self) {
    if (Binding* binding = binding_in(self)) binding->drop_references();
    return 0;
  };
}

void bind_binding(py::module_& m) {
  m.def("set_data", [](const at::Tensor& parameter, const at::Tensor& data) {
    Binding::assign(parameter, data.detach());
  });
  py::class_<Change>(m, "Change")
      .def_readonly("index", &Change::index)
      .def_property_readonly("kind",
                             [](const Change& change) { return static_cast<int>(change.kind); });
  py::class_<Binding>(m, "Binding", py::custom_type_setup(&collect_binding))
      .def(py::init<at::Tensor, std::shared_ptr<Engine>>())
      .def("add",
           [](Binding& binding, const py::dict& parameters, const std::string& name,
              const py::object& object, int32_t leaf) {
             return binding.add(parameters.ptr(), name, object.ptr(), py::cast<at::Tensor>(object),
                                leaf);
           })
      .def("replace",
           [](Binding& binding, int64_t index, const py::object& object) {
             binding.replace(index, object.ptr(), py::cast<at::Tensor>(object));
           })
      .def("leaf_bytes", &Binding::leaf_bytes)
      .def_property_readonly("num_leaves", &Binding::num_leaves)
      .def("place_host", &Binding::place_host)
      .def("fill",
           [](Binding& binding, HostArena& arena, int num_threads, py::object progress,
              Pinner& pinner) {
             const HostArena::Progress callback = progress_of(std::move(progress));
             const PinCalls pin = pinner.calls();
             py::gil_scoped_release no_gil;
             return binding.fill(arena, num_threads, callback, pin);
           })
      .def("adopt", &Binding::adopt, py::call_guard<py::gil_scoped_release>())
      .def("is_adopted", &Binding::is_adopted)
      .def("arena_offset", &Binding::arena_offset)
      .def("rearrange", &Binding::rearrange, py::call_guard<py::gil_scoped_release>())
      .def("retire", &Binding::retire)
      .def("place_device",
           [](Binding& binding, int32_t leaf, uint64_t address, const at::Tensor& token,
              int32_t piece, bool is_last) {
             binding.place_device(leaf, address, token.device(), piece, is_last);
           })
      .def("acquire_leaf", &Binding::acquire_leaf)
      .def("release_leaf",
           [](const Binding& binding, int32_t leaf, const std::vector<at::Tensor>& out) {
             binding.release_leaf(leaf, out);
           })
      .def("bind", &Binding::bind)
      .def("unbind", &Binding::unbind)
      .def("divert", [](Binding& binding, int64_t index,
                        const at::Tensor& token) { binding.divert(index, token.device()); })
      .def("changes", &Binding::changes)
      .def("settle", &Binding::settle)
      .def("watch", [](Binding& binding, const py::dict& dict,
                       bool values) { binding.watch(dict.ptr(), values); })
      .def("is_restructured", &Binding::is_restructured)
      .def("requires_grad", &Binding::requires_grad)
      .def("host", &Binding::host)
      .def("leaf_of", &Binding::leaf_of)
      .def_property_readonly("foreign", &Binding::foreign);
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "The C++ engine of blockswap.";
  register_errors();
  bind_plan(m);
  bind_memory(m);
  bind_pool(m);
  bind_replay(m);
  bind_engine(m);
  bind_binding(m);
  add_watched_dict(m.ptr());
}
