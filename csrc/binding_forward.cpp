// What a Binding does at the borders of a forward and during one; binding.cpp prepares it.

#include <c10/core/GradMode.h>

#include <algorithm>

#include "binding.h"
#include "error.h"

namespace blockswap {
namespace {

// Lets Python's other threads run, if this one holds its lock: a copy from memory that could not be
// pinned blocks. The hooks call with the lock, torch.ops without.
class WithoutPythonLock {
 public:
  WithoutPythonLock() : state_(PyGILState_Check() != 0 ? PyEval_SaveThread() : nullptr) {}
  ~WithoutPythonLock() {
    if (state_ != nullptr) {
      PyEval_RestoreThread(state_);
    }
  }
  WithoutPythonLock(const WithoutPythonLock&) = delete;
  WithoutPythonLock& operator=(const WithoutPythonLock&) = delete;

 private:
  PyThreadState* state_;
};

// A forward's own work has driven all of this out of the caches. The walks below know long before
// what they will touch, so that they wait for memory once and not at every entry.
constexpr size_t kAhead = 12;
constexpr size_t kSmallTable = 256;  // bytes of a dict's table for up to eight entries

void prefetch_bytes(const void* address, size_t bytes) {
  constexpr size_t kLine = 64;
  for (size_t i = 0; i < bytes; i += kLine) {
    __builtin_prefetch(static_cast<const char*>(address) + i);
  }
}

// Members of every TensorImpl, named through a class of ours: they are protected.
struct Impl : c10::TensorImpl {
  static void move_to(c10::TensorImpl* impl, const c10::Storage& storage, c10::DispatchKeySet keys,
                      c10::Device device) {
    impl->*(&Impl::storage_) = storage;
    // As copy_tensor_metadata does: what Python added to this parameter stays.
    c10::DispatchKeySet& held = impl->*(&Impl::key_set_);
    held = (keys - c10::python_ks) | (held & c10::python_ks);
    impl->*(&Impl::device_opt_) = device;
  }
};

}  // namespace

void Binding::place_device(int32_t leaf, uint64_t address, const c10::Device& device, int32_t piece,
                           bool is_last) {
  LeafPlace& place = leaf_place(leaf);
  place.piece = piece;
  place.is_last = is_last;
  place.on_device = address != 0;
  for (const int64_t index : place.entries) {
    Entry& entry = entries_[static_cast<size_t>(index)];
    if (entry.device) {
      leaf_of_storage_.erase(entry.device.unsafeGetStorageImpl());
      entry.device = c10::Storage();
    }
    if (address != 0) {
      void* data = reinterpret_cast<void*>(address + static_cast<uint64_t>(entry.image_offset));
      const at::Tensor there = tensor_over(data, entry.host, device, [](void*) {});
      device_keys_ = there.key_set();
      entry.device = there.storage();
      leaf_of_storage_[entry.device.unsafeGetStorageImpl()] = leaf;
    }
  }
}

void Binding::prefetch(size_t index) const {
  if (index < entries_.size()) {
    const Entry& entry = entries_[index];
    prefetch_bytes(entry.tensor.unsafeGetTensorImpl(), sizeof(c10::TensorImpl));
    prefetch_bytes(entry.host.unsafeGetTensorImpl(), sizeof(c10::TensorImpl));
    prefetch_bytes(entry.device.unsafeGetStorageImpl(), 1);
    prefetch_bytes(entry.parameters, sizeof(PyDictObject));
  }
}

// The image and the device bytes differ in nothing but where they are.
void Binding::put_on_device(const Entry& entry) const {
  Impl::move_to(entry.tensor.unsafeGetTensorImpl(), entry.device, device_keys_,
                entry.device.device());
}

void Binding::put_on_host(const Entry& entry) const {
  Impl::move_to(entry.tensor.unsafeGetTensorImpl(), entry.host.storage(), entry.host.key_set(),
                c10::kCPU);
}

void Binding::bind() {
  for (size_t i = 0; i < entries_.size(); ++i) {
    prefetch(i + kAhead);
    Entry& entry = entries_[i];
    if (entry.device) {
      put_on_device(entry);
    }
    entry.version = entry.tensor.unsafeGetTensorImpl()->version_counter().current_version();
  }
  thread_ = PyThread_get_thread_ident();
  bound_ = true;
}

std::vector<int64_t> Binding::unbind() {
  std::vector<int64_t> edited;
  if (!bound_) {
    return edited;
  }
  for (size_t i = 0; i < entries_.size(); ++i) {
    prefetch(i + kAhead);
    Entry& entry = entries_[i];
    const uint32_t version =
        entry.tensor.unsafeGetTensorImpl()->version_counter().current_version();
    const c10::StorageImpl* held =
        entry.tensor.unsafeGetTensorImpl()->unsafe_storage().unsafeGetStorageImpl();
    const bool moved =
        !entry.diverted && entry.device && held != entry.device.unsafeGetStorageImpl();
    const bool changed = version != entry.version || moved;
    if (changed) {
      edited.push_back(static_cast<int64_t>(i));
    }
    if (entry.diverted || (changed && entry.device)) {
      assign(entry.tensor, entry.host);
      entry.diverted = false;
    } else if (entry.device) {
      put_on_host(entry);
    }
    entry.version = version;
  }
  bound_ = false;
  return edited;
}

void Binding::divert(int64_t index, const c10::Device& device) {
  Entry& entry = entries_.at(static_cast<size_t>(index));
  if (!entry.diverted) {
    c10::NoGradGuard no_grad;
    // On the current stream, like the read that follows; the caching allocator keeps it from reuse.
    assign(entry.tensor, entry.host.to(device, /*non_blocking=*/true, /*copy=*/true));
    entry.diverted = true;
  }
}

std::vector<Change> Binding::changes() const {
  std::vector<Change> found;
  for (size_t i = 0; i < entries_.size(); ++i) {
    prefetch(i + kAhead);
    const Entry& entry = entries_[i];
    const c10::TensorImpl* impl = entry.tensor.unsafeGetTensorImpl();
    const auto index = static_cast<int64_t>(i);
    if (PyDict_GetItemWithError(entry.parameters, entry.name) != entry.object) {
      found.push_back({index, Change::Kind::kReplaced});
    } else if (impl->unsafe_storage().unsafeGetStorageImpl() !=
                   entry.host.storage().unsafeGetStorageImpl() ||
               impl->storage_offset() != 0 || impl->sizes() != entry.host.sizes() ||
               impl->strides() != entry.host.strides() || impl->dtype() != entry.host.dtype()) {
      found.push_back({index, Change::Kind::kRebound});
    } else if (impl->version_counter().current_version() != entry.version) {
      found.push_back({index, Change::Kind::kWritten});
    }
  }
  return found;
}

void Binding::settle() {
  for (Entry& entry : entries_) {
    entry.version = entry.tensor.unsafeGetTensorImpl()->version_counter().current_version();
  }
}

void Binding::watch(PyObject* dict, bool values) {
  Watched watched{Py_NewRef(dict), PyDict_Size(dict), watched_values_.size(), 0};
  PyObject* key = nullptr;
  PyObject* value = nullptr;
  for (Py_ssize_t position = 0; values && PyDict_Next(dict, &position, &key, &value) != 0;) {
    watched_values_.push_back(value);
    ++watched.num_values;
  }
  watched_.push_back(watched);
}

bool Binding::is_restructured() const {
  for (size_t i = 0; i < watched_.size(); ++i) {
    if (i + 2 * kAhead < watched_.size()) {
      prefetch_bytes(watched_[i + 2 * kAhead].dict, sizeof(PyDictObject));
    }
    if (i + kAhead < watched_.size() && watched_[i + kAhead].num_values > 0) {
      const PyObject* next = watched_[i + kAhead].dict;
      prefetch_bytes(reinterpret_cast<const PyDictObject*>(next)->ma_keys, kSmallTable);
    }
    const Watched& watched = watched_[i];
    if (PyDict_Size(watched.dict) != watched.size) {
      return true;
    }
    if (watched.num_values == 0) {
      continue;
    }
    PyObject* key = nullptr;
    PyObject* value = nullptr;
    const PyObject* const* expected = &watched_values_[watched.first_value];
    for (Py_ssize_t position = 0; PyDict_Next(watched.dict, &position, &key, &value) != 0;) {
      if (value != *expected++) {
        return true;
      }
    }
  }
  return false;
}

bool Binding::requires_grad() const {
  return std::any_of(entries_.begin(), entries_.end(),
                     [](const Entry& entry) { return entry.tensor.requires_grad(); });
}

const Binding::LeafPlace* Binding::place_of(at::TensorList weights) {
  if (!bound_ || weights.empty()) {
    return nullptr;
  }
  const auto found = leaf_of_storage_.find(weights[0].storage().unsafeGetStorageImpl());
  if (found == leaf_of_storage_.end()) {
    ++foreign_;  // diverted, or a copy that a tracer made: nothing of ours to order
    return nullptr;
  }
  return &leaves_[static_cast<size_t>(found->second)];
}

void Binding::acquire_leaf(int32_t leaf) const {
  call_acquire(token_, leaves_.at(static_cast<size_t>(leaf)).weights);
}

void Binding::release_leaf(int32_t leaf, at::TensorList out) const {
  call_release(token_, out, leaves_.at(static_cast<size_t>(leaf)).weights);
}

void Binding::acquire(at::TensorList weights, Device::Stream compute) {
  const LeafPlace* place = place_of(weights);
  if (place != nullptr && place->piece >= 0) {
    const int32_t piece = place->piece;
    const WithoutPythonLock others_run;
    engine_->acquire(piece, compute);
  }
}

void Binding::release(at::TensorList weights, Device::Stream compute) {
  const LeafPlace* place = place_of(weights);
  if (place != nullptr && place->is_last) {
    const int32_t piece = place->piece;
    const WithoutPythonLock others_run;
    engine_->release(piece, compute);
  }
}

}  // namespace blockswap
