#include "binding.h"

#include <ATen/ops/from_blob.h>
#include <c10/core/GradMode.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <utility>

#include "copy_team.h"
#include "error.h"
#include "os.h"
#include "watched.h"

namespace blockswap {
namespace {

// Tensors below malloc's threshold for a mapping of their own (32 MiB at most) go back to malloc,
// not to the system; so often it is told to pass them on.
constexpr int64_t kTrimBytes = int64_t{512} << 20;

std::unordered_map<const c10::StorageImpl*, Binding*>& bindings_by_token() {
  static auto* all = new std::unordered_map<const c10::StorageImpl*, Binding*>;  // outlives exit
  return *all;
}

// copy_tensor_metadata is what `.data =` uses; shallow_copy_from would refuse a change of backend
// that it does not know (PrivateUse1).
struct MetadataCopy : c10::TensorImpl {
  static void run(const c10::TensorImpl* source, c10::TensorImpl* target) {
    copy_tensor_metadata(source, target, target->version_counter(),
                         target->allow_tensor_metadata_change());
  }
};

}  // namespace

// A tensor of its own exact-size Storage.
at::Tensor Binding::tensor_over(void* address, const at::Tensor& like, const c10::Device& device,
                                std::function<void(void*)> deleter) {
  c10::InferenceMode normal(false);  // inference tensors could never be bound outside of it
  return at::from_blob(address, like.sizes(), like.strides(), std::move(deleter),
                       like.options().device(device).requires_grad(false), device);
}

Binding::Binding(at::Tensor token, std::shared_ptr<Engine> engine)
    : token_(std::move(token)), engine_(std::move(engine)) {
  bindings_by_token()[token_.storage().unsafeGetStorageImpl()] = this;
}

Binding::~Binding() {
  bindings_by_token().erase(token_.storage().unsafeGetStorageImpl());
  drop_references();
}

int Binding::visit(visitproc visit, void* arg) const {
  for (const Entry& entry : entries_) {
    Py_VISIT(entry.parameters);
    Py_VISIT(entry.object);
  }
  for (const Watched& watched : watched_) {
    Py_VISIT(watched.dict);
  }
  return 0;
}

void Binding::drop_references() {
  // Moved out first: what dies here may come back and look.
  const std::vector<Entry> entries = std::exchange(entries_, {});
  const std::vector<Watched> watched = std::exchange(watched_, {});
  watched_values_.clear();
  leaves_.clear();
  leaf_of_storage_.clear();
  for (const Entry& entry : entries) {
    if (WatchedDict* watched = as_watched(entry.parameters)) watched->binding = nullptr;
    Py_DECREF(entry.parameters);
    Py_DECREF(entry.name);
    Py_DECREF(entry.object);
  }
  for (const Watched& each : watched) {
    Py_DECREF(each.dict);
  }
}

void Binding::assign(const at::Tensor& parameter, const at::Tensor& data) {
  MetadataCopy::run(data.unsafeGetTensorImpl(), parameter.unsafeGetTensorImpl());
}

int64_t Binding::add(PyObject* parameters, const std::string& name, PyObject* object,
                     const at::Tensor& tensor, int32_t leaf) {
  LeafPlace& place = leaf_place(leaf);
  if (WatchedDict* watched = as_watched(parameters); watched && watched->binding == nullptr) {
    watched->binding = this;
    watched->leaf = leaf;
  }
  Entry entry;
  entry.parameters = Py_NewRef(parameters);
  entry.name = PyUnicode_InternFromString(name.c_str());
  entry.object = Py_NewRef(object);
  entry.tensor = tensor;
  entry.leaf = leaf;
  entry.bytes = static_cast<int64_t>(tensor.nbytes());
  entry.image_offset = place.layout.place(entry.bytes);
  const auto index = static_cast<int64_t>(entries_.size());
  entries_.push_back(std::move(entry));
  place.entries.push_back(index);
  place.weights.push_back(tensor);
  return index;
}

void Binding::replace(int64_t index, PyObject* object, const at::Tensor& tensor) {
  Entry& entry = entries_.at(static_cast<size_t>(index));
  Py_SETREF(entry.object, Py_NewRef(object));
  entry.tensor = tensor;
  entry.adopted = false;
  adopt(index);
  LeafPlace& place = leaf_place(entry.leaf);
  const auto position = std::find(place.entries.begin(), place.entries.end(), index);
  place.weights[static_cast<size_t>(position - place.entries.begin())] = tensor;
}

int64_t Binding::leaf_bytes(int32_t leaf) const {
  return leaves_.at(static_cast<size_t>(leaf)).layout.bytes();
}

Binding* Binding::find(const at::Tensor& token) {
  const auto& all = bindings_by_token();
  const auto found = all.find(token.storage().unsafeGetStorageImpl());
  return found == all.end() ? nullptr : found->second;
}

Binding::LeafPlace& Binding::leaf_place(int32_t leaf) {
  if (leaf < 0) {
    throw UseError("leaf " + std::to_string(leaf) + " does not exist");
  }
  if (static_cast<size_t>(leaf) >= leaves_.size()) {
    leaves_.resize(static_cast<size_t>(leaf) + 1);
  }
  return leaves_[static_cast<size_t>(leaf)];
}

void Binding::place_host(int32_t leaf, const std::shared_ptr<HostArena>& arena, int64_t offset) {
  LeafPlace& place = leaf_place(leaf);
  place.arena_offset = offset;
  for (const int64_t index : place.entries) {
    Entry& entry = entries_[static_cast<size_t>(index)];
    const int64_t begin = offset + entry.image_offset;
    const int64_t bytes = entry.bytes;
    // After retire() the pages go back to the system when the last tensor over them dies; before,
    // another image may have been laid over them.
    entry.host = tensor_over(arena->data() + begin, entry.tensor, c10::kCPU,
                             [arena, begin, bytes, retired = retired_](void*) {
                               if (retired->load()) {
                                 arena->release(begin, bytes);
                               }
                             });
    if (entry.adopted) {
      assign(entry.tensor, entry.host);
    }
  }
}

bool Binding::fill(HostArena& arena, int num_threads, const HostArena::Progress& progress,
                   const PinCalls& pin) {
  std::vector<const LeafPlace*> order;
  for (const LeafPlace& place : leaves_) {
    order.push_back(&place);
  }
  std::sort(order.begin(), order.end(), [](const LeafPlace* a, const LeafPlace* b) {
    return a->arena_offset < b->arena_offset;
  });
  std::vector<HostArena::Copy> copies;
  std::atomic<int64_t> dropped_bytes{0};
  for (const LeafPlace* place : order) {
    for (const int64_t index : place->entries) {
      Entry& entry = entries_[static_cast<size_t>(index)];
      if (entry.adopted || !entry.tensor.device().is_cpu()) {
        continue;
      }
      copies.push_back({entry.tensor.const_data_ptr(), place->arena_offset + entry.image_offset,
                        entry.bytes, [&entry, &dropped_bytes] {
                          assign(entry.tensor, entry.host);  // drops the original's memory
                          entry.adopted = true;
                          const int64_t before = dropped_bytes.fetch_add(entry.bytes);
                          if (before / kTrimBytes != (before + entry.bytes) / kTrimBytes) {
                            os::return_freed_memory();
                          }
                        }});
    }
  }
  const bool complete = arena.fill(copies, num_threads, progress, pin);
  os::return_freed_memory();
  return complete;
}

void Binding::adopt(int64_t index) {
  Entry& entry = entries_.at(static_cast<size_t>(index));
  if (!entry.adopted) {
    c10::NoGradGuard no_grad;
    entry.host.copy_(entry.tensor.detach());
    assign(entry.tensor, entry.host);
    entry.adopted = true;
  }
}

bool Binding::is_adopted(int64_t index) const {
  return entries_.at(static_cast<size_t>(index)).adopted;
}

int64_t Binding::arena_offset(int32_t leaf) const {
  return leaves_.at(static_cast<size_t>(leaf)).arena_offset;
}

// Nobody else holds tensors over the leaf's image, so it may lie elsewhere in the arena.
bool Binding::is_movable(int32_t leaf) const {
  const LeafPlace& place = leaves_.at(static_cast<size_t>(leaf));
  return std::all_of(place.entries.begin(), place.entries.end(), [&](int64_t index) {
    const Entry& entry = entries_[static_cast<size_t>(index)];
    return entry.host.storage().use_count() == 2;  // `host` itself and the parameter
  });
}

void Binding::rearrange(const std::shared_ptr<HostArena>& arena,
                        const std::vector<std::vector<Move>>& groups) {
  const auto bytes_of = [this](const std::vector<Move>& group) {
    int64_t total = 0;
    for (const auto& [leaf, offset] : group) {
      total += leaf_bytes(leaf);
    }
    return total;
  };
  int64_t largest = 0;
  for (const std::vector<Move>& group : groups) {
    largest = std::max(largest, bytes_of(group));
  }
  // One for all groups, not cleared: fresh pages cost more than the copies.
  const std::unique_ptr<uint8_t[]> scratch(new uint8_t[static_cast<size_t>(largest)]);
  CopyTeam team;
  for (const std::vector<Move>& group : groups) {
    if (!std::all_of(group.begin(), group.end(),
                     [this](const Move& move) { return is_movable(move.first); })) {
      continue;
    }
    uint8_t* cursor = scratch.get();
    for (const auto& [leaf, offset] : group) {
      team.copy(cursor, arena->data() + leaf_place(leaf).arena_offset, leaf_bytes(leaf));
      cursor += leaf_bytes(leaf);
    }
    cursor = scratch.get();
    for (const auto& [leaf, offset] : group) {
      team.copy(arena->data() + offset, cursor, leaf_bytes(leaf));
      cursor += leaf_bytes(leaf);
    }
    for (const auto& [leaf, offset] : group) {
      place_host(leaf, arena, offset);
    }
  }
}

}  // namespace blockswap
