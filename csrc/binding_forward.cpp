// What a Binding does at the borders of a forward and during one; binding.cpp prepares it.

#include <c10/core/GradMode.h>

#include <algorithm>

#include "binding.h"
#include "error.h"

namespace blockswap {

void Binding::place_device(int32_t leaf, uint64_t address, const c10::Device& device, int32_t piece,
                           bool is_last) {
  LeafPlace& place = leaf_place(leaf);
  place.piece = piece;
  place.is_last = is_last;
  place.on_device = address != 0;
  for (const int64_t index : place.entries) {
    Entry& entry = entries_[static_cast<size_t>(index)];
    if (entry.device.defined()) {
      leaf_of_storage_.erase(entry.device.storage().unsafeGetStorageImpl());
      entry.device = at::Tensor();
    }
    if (address != 0) {
      void* data = reinterpret_cast<void*>(address + static_cast<uint64_t>(entry.image_offset));
      entry.device = tensor_over(data, entry.host, device, [](void*) {});
      leaf_of_storage_[entry.device.storage().unsafeGetStorageImpl()] = leaf;
    }
  }
}

void Binding::bind() {
  for (Entry& entry : entries_) {
    if (entry.device.defined()) {
      assign(entry.tensor, entry.device);
    }
    entry.version = entry.tensor.unsafeGetTensorImpl()->version_counter().current_version();
  }
  thread_ = PyThread_get_thread_ident();
  bound_ = true;
}

std::vector<int64_t> Binding::unbind() {
  std::vector<int64_t> edited;
  for (size_t i = 0; i < entries_.size(); ++i) {
    Entry& entry = entries_[i];
    const uint32_t version =
        entry.tensor.unsafeGetTensorImpl()->version_counter().current_version();
    const bool moved =
        !entry.diverted && entry.device.defined() &&
        entry.tensor.unsafeGetTensorImpl()->unsafe_storage().unsafeGetStorageImpl() !=
            entry.device.storage().unsafeGetStorageImpl();
    if (version != entry.version || moved) {
      edited.push_back(static_cast<int64_t>(i));
    }
    if (entry.device.defined() || entry.diverted) {
      assign(entry.tensor, entry.host);
      entry.diverted = false;
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
    const Entry& entry = entries_[i];
    const c10::TensorImpl* impl = entry.tensor.unsafeGetTensorImpl();
    const auto index = static_cast<int64_t>(i);
    if (PyDict_GetItem(entry.parameters, entry.name) != entry.object) {
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
  Watched watched{Py_NewRef(dict), PyDict_Size(dict), values, {}};
  PyObject* key = nullptr;
  PyObject* value = nullptr;
  for (Py_ssize_t position = 0; PyDict_Next(dict, &position, &key, &value) != 0;) {
    watched.values.push_back(value);
  }
  watched_.push_back(std::move(watched));
}

bool Binding::is_restructured() const {
  return std::any_of(watched_.begin(), watched_.end(), [](const Watched& watched) {
    if (PyDict_Size(watched.dict) != watched.size) {
      return true;
    }
    if (!watched.compares_values) {
      return false;
    }
    PyObject* key = nullptr;
    PyObject* value = nullptr;
    size_t i = 0;
    for (Py_ssize_t position = 0; PyDict_Next(watched.dict, &position, &key, &value) != 0; ++i) {
      if (value != watched.values[i]) {
        return true;
      }
    }
    return false;
  });
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

void Binding::acquire(at::TensorList weights, Device::Stream compute) {
  const LeafPlace* place = place_of(weights);
  if (place != nullptr && place->piece >= 0) {
    engine_->acquire(place->piece, compute);
  }
}

void Binding::release(at::TensorList weights, Device::Stream compute) {
  const LeafPlace* place = place_of(weights);
  if (place != nullptr && place->is_last) {
    engine_->release(place->piece, compute);
  }
}

}  // namespace blockswap
