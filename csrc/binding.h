#pragma once

#include <ATen/core/Tensor.h>
#include <Python.h>

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "engine.h"
#include "host_arena.h"
#include "image.h"

namespace blockswap {

// How a parameter was found to differ from what the last forward left behind.
struct Change {
  enum class Kind : int32_t {
    kReplaced = 1,  // the module holds another object under this name (or none)
    kRebound = 2,   // `.data =`: the same object over other memory
    kWritten = 3,   // written in place (its version counter moved)
  };
  int64_t index;
  Kind kind;
};

// Ties parameters to their two addresses: the host image outside a forward, the device address
// inside one. Both are tensors with a Storage of their own, of exactly the parameter's size;
// binding copies their metadata into the parameter, which stays the same object with the same
// version. Not thread-safe; the GIL is held, except in fill() and rearrange().
class Binding {
 public:
  Binding(at::Tensor token, std::shared_ptr<Engine> engine);
  ~Binding();
  Binding(const Binding&) = delete;
  Binding& operator=(const Binding&) = delete;

  // What `.data =` does, for any pair of devices: the parameter stays the same object.
  static void assign(const at::Tensor& parameter, const at::Tensor& data);

  // `parameters` is the module's own dict, looked into raw: no access is noted. A leaf's image
  // holds its parameters in the order in which they were added. Returns the parameter's index.
  int64_t add(PyObject* parameters, const std::string& name, PyObject* object,
              const at::Tensor& tensor, int32_t leaf);
  // The module holds another parameter of equal shape and dtype now: its values become the image's.
  void replace(int64_t index, PyObject* object, const at::Tensor& tensor);
  int64_t leaf_bytes(int32_t leaf) const;
  int32_t num_leaves() const { return static_cast<int32_t>(leaves_.size()); }

  // The leaf's image lies at `offset` of the arena.
  void place_host(int32_t leaf, const std::shared_ptr<HostArena>& arena, int64_t offset);
  // Copies the parameters of all leaves that lie in CPU memory into their images, in the arena's
  // order, and lets go of each original as soon as its copy is complete. Returns false when
  // `progress` cancelled it: each parameter then has either its original or its image, both whole.
  bool fill(HostArena& arena, int num_threads, const HostArena::Progress& progress,
            const PinCalls& pin);
  // The same for one parameter, from wherever it lies.
  void adopt(int64_t index);
  bool is_adopted(int64_t index) const;
  // Where in the arena the leaf's image lies.
  int64_t arena_offset(int32_t leaf) const;
  // The parameters become ordinary ones: what dies gives its part of the arena back.
  void retire() { retired_->store(true); }
  // A leaf and the offset of the arena at which its image is to lie.
  using Move = std::pair<int32_t, int64_t>;
  // Moves images within the arena, a group after the other: its bytes are all read before any is
  // written. A group stays where somebody else holds tensors over one of its images.
  void rearrange(const std::shared_ptr<HostArena>& arena,
                 const std::vector<std::vector<Move>>& groups);

  // The leaf's device address while a forward runs (0 = none), its piece (-1 = always on the
  // device) and whether the piece ends with it.
  void place_device(int32_t leaf, uint64_t address, const c10::Device& device, int32_t piece,
                    bool is_last);
  void bind();
  // Returns the indices of parameters that the forward itself changed; none if nothing is bound.
  std::vector<int64_t> unbind();
  // One parameter, for the rest of this forward, over a copy of its image on `device`.
  void divert(int64_t index, const c10::Device& device);
  bool is_bound() const { return bound_; }

  // Outside a forward: what differs from the last unbind().
  std::vector<Change> changes() const;
  // From now on is_restructured() tells when this dict of a module gains or loses an entry or, with
  // `values`, when an entry becomes another object.
  void watch(PyObject* dict, bool values);
  bool is_restructured() const;
  // What changes() reports has been dealt with.
  void settle();
  bool requires_grad() const;

  at::Tensor host(int64_t index) const { return entries_.at(static_cast<size_t>(index)).host; }
  int32_t leaf_of(int64_t index) const { return entries_.at(static_cast<size_t>(index)).leaf; }

  // Called by the ops, on the caller's compute stream.
  void acquire(at::TensorList weights, Device::Stream compute);
  void release(at::TensorList weights, Device::Stream compute);
  // What the hooks call in eager mode: the ops with the leaf's parameters.
  void acquire_leaf(int32_t leaf) const;
  void release_leaf(int32_t leaf, at::TensorList out) const;
  static Binding* find(const at::Tensor& token);
  int64_t foreign() const { return foreign_; }

  // How a leaf's weights may be read by whoever asks.
  enum class Access {
    kFree,  // they are on the device for the whole forward
    kLive,  // they are there while their piece runs, as now, for the thread whose forward it is
    kAsk,   // neither, or no forward runs
  };
  Access access(int32_t leaf) const {
    const LeafPlace& place = leaves_[static_cast<size_t>(leaf)];
    if (!bound_ || !place.on_device) {
      return Access::kAsk;
    }
    if (place.piece < 0) {
      return Access::kFree;
    }
    const bool runs = place.piece == engine_->live() && PyThread_get_thread_ident() == thread_;
    return runs ? Access::kLive : Access::kAsk;
  }

  // For Python's collector: a model holds its session, which holds this, which holds its modules.
  int visit(visitproc visit, void* arg) const;
  void drop_references();

 private:
  struct Entry {
    PyObject* parameters = nullptr;  // strong
    PyObject* name = nullptr;        // strong, interned
    PyObject* object = nullptr;      // strong
    at::Tensor tensor;               // the same parameter, for C++
    at::Tensor host;                 // undefined until placed
    c10::Storage device;             // null = none
    int32_t leaf = 0;
    int64_t image_offset = 0;  // in the leaf's image
    int64_t bytes = 0;
    uint32_t version = 0;
    bool adopted = false;  // the image is the truth
    bool diverted = false;
  };
  struct LeafPlace {
    std::vector<int64_t> entries;
    std::vector<at::Tensor> weights;  // of the entries, as the ops take them
    ImageLayout layout;
    int64_t arena_offset = -1;
    int32_t piece = -1;
    bool is_last = false;
    bool on_device = false;
  };
  struct Watched {
    PyObject* dict;  // strong
    Py_ssize_t size;
    size_t first_value;  // in watched_values_
    size_t num_values;   // 0: only the size counts
  };

  void prefetch(size_t index) const;
  void put_on_device(const Entry& entry) const;
  void put_on_host(const Entry& entry) const;
  static at::Tensor tensor_over(void* address, const at::Tensor& like, const c10::Device& device,
                                std::function<void(void*)> deleter);
  const LeafPlace* place_of(at::TensorList weights);
  LeafPlace& leaf_place(int32_t leaf);
  bool is_movable(int32_t leaf) const;

  at::Tensor token_;
  std::shared_ptr<Engine> engine_;
  std::vector<Entry> entries_;
  std::vector<LeafPlace> leaves_;
  std::vector<Watched> watched_;
  std::vector<const PyObject*> watched_values_;  // compared by address only
  c10::DispatchKeySet device_keys_;              // of parameters on the device
  std::unordered_map<const c10::StorageImpl*, int32_t> leaf_of_storage_;
  std::shared_ptr<std::atomic<bool>> retired_ = std::make_shared<std::atomic<bool>>(false);
  bool bound_ = false;
  unsigned long thread_ = 0;  // that bound them
  int64_t foreign_ = 0;
};

// The two ops through PyTorch's dispatcher, where profilers see them, without the conversions that
// a call from Python costs (6 to 15 us with cold caches).
void call_acquire(const at::Tensor& token, at::TensorList w);
void call_release(const at::Tensor& token, at::TensorList out, at::TensorList w);

// The stream that PyTorch issues work on, for this thread.
Device::Stream current_stream(const c10::Device& device);

}  // namespace blockswap
