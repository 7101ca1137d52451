#include "watched.h"

#include <pybind11/pybind11.h>

#include "binding.h"

namespace py = pybind11;

namespace blockswap {
namespace {

PyTypeObject* watched_type = nullptr;
PyObject* module_getattr = nullptr;  // the code of nn.Module.__getattr__

// The code that asks for a parameter: past nn.Module.__getattr__. A new reference, or null.
PyObject* reading_code() {
  PyFrameObject* frame = PyEval_GetFrame();
  if (frame == nullptr) {
    return nullptr;
  }
  auto* code = reinterpret_cast<PyObject*>(PyFrame_GetCode(frame));
  if (code != module_getattr) {
    return code;
  }
  PyFrameObject* caller = PyFrame_GetBack(frame);
  if (caller == nullptr) {
    return code;
  }
  Py_DECREF(code);
  code = reinterpret_cast<PyObject*>(PyFrame_GetCode(caller));
  Py_DECREF(caller);
  return code;
}

bool is_known_reader(const WatchedDict& watched) {
  if (watched.readers == nullptr || PyDict_Size(watched.readers) == 0) {
    return false;
  }
  PyObject* code = reading_code();
  if (code == nullptr) {
    return false;
  }
  // By identity: a code object's hash runs over all of its instructions.
  PyObject* key = PyLong_FromVoidPtr(code);
  Py_DECREF(code);
  const bool known = key != nullptr && PyDict_Contains(watched.readers, key) == 1;
  Py_XDECREF(key);
  return known;
}

bool is_harmless(const WatchedDict& watched) {
  if (watched.binding == nullptr) {
    return false;
  }
  switch (watched.binding->access(watched.leaf)) {
    case Binding::Access::kFree:
      return true;
    case Binding::Access::kLive:
      return is_known_reader(watched);
    case Binding::Access::kAsk:
      break;
  }
  return false;
}

PyObject* get_item(PyObject* self, PyObject* key) {
  if (is_harmless(*reinterpret_cast<WatchedDict*>(self))) {
    PyObject* value = PyDict_GetItemWithError(self, key);
    if (value != nullptr) {
      return Py_NewRef(value);
    }
    if (PyErr_Occurred() == nullptr) {
      PyErr_SetObject(PyExc_KeyError, key);
    }
    return nullptr;
  }
  return PyObject_CallMethod(self, "read", "O", key);
}

PyObject* set_readers(PyObject* self, PyObject* readers) {
  if (!PyDict_Check(readers)) {
    PyErr_SetString(PyExc_TypeError, "readers are a dict of code objects by their id");
    return nullptr;
  }
  reinterpret_cast<WatchedDict*>(self)->readers = readers;
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"set_readers", &set_readers, METH_O, "Takes {id(code): code}; the caller keeps it alive."},
    {nullptr, nullptr, 0, nullptr},
};

PyType_Slot slots[] = {
    {Py_tp_doc, const_cast<char*>("A dict whose harmless reads during a forward are not noted.")},
    {Py_mp_subscript, reinterpret_cast<void*>(&get_item)},
    {Py_tp_methods, methods},
    {0, nullptr},
};

PyType_Spec spec = {"blockswap._C.WatchedDict", sizeof(WatchedDict), 0,
                    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE, slots};

}  // namespace

void add_watched_dict(PyObject* module) {
  const auto bases = py::make_tuple(py::handle(reinterpret_cast<PyObject*>(&PyDict_Type)));
  watched_type = reinterpret_cast<PyTypeObject*>(PyType_FromSpecWithBases(&spec, bases.ptr()));
  if (watched_type == nullptr) {
    throw py::error_already_set();
  }
  const py::object nn_module = py::module_::import("torch.nn").attr("Module");
  module_getattr =
      nn_module.attr("__getattr__").attr("__code__").cast<py::object>().release().ptr();
  py::setattr(module, "WatchedDict", reinterpret_cast<PyObject*>(watched_type));
}

WatchedDict* as_watched(PyObject* object) {
  const bool is_one = watched_type != nullptr && PyObject_TypeCheck(object, watched_type);
  return is_one ? reinterpret_cast<WatchedDict*>(object) : nullptr;
}

}  // namespace blockswap
