#pragma once

#include <Python.h>

#include <cstdint>

namespace blockswap {

class Binding;

// A module's `_parameters` while its leaf is managed: a dict whose reads during a forward cost
// nothing as long as they are harmless. A read is harmless when the leaf is always on the device,
// or when its piece is live and the reading code was seen to read it while the leaf itself ran.
// Every other read calls the Python method `read(key)`. GIL held throughout.
struct WatchedDict {
  PyDictObject dict;
  const Binding* binding;  // null: every read asks
  int32_t leaf;
  PyObject* readers;  // borrowed from the subclass: {id(code): code}
};

// Adds the type WatchedDict to the module.
void add_watched_dict(PyObject* module);
// Null when the object is another dict.
WatchedDict* as_watched(PyObject* object);

}  // namespace blockswap
