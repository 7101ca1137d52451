// Stand-ins: an operator's tensor arguments rebuilt on another device type, same metadata, same
// sharing of storages. On `meta` they tell what the operator would return; on `cpu` they are the
// fake device's bytes themselves, so that a CPU kernel can read and write them.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>
#include <ATen/core/stack.h>
#include <c10/core/Storage.h>

#include <unordered_map>

namespace fake {

// Calls visit(tensor) for each defined tensor in a Tensor, Tensor?, Tensor[] or Tensor?[] value.
template <typename Visit>
void for_each_tensor(const c10::IValue& value, Visit visit) {
  if (value.isTensor()) {
    if (value.toTensor().defined()) {
      visit(value.toTensor());
    }
  } else if (value.isTensorList() || value.isOptionalTensorList()) {
    for (const c10::IValue& element : value.toListRef()) {
      for_each_tensor(element, visit);
    }
  }
}

class StandIns {
 public:
  // Host tensors among the arguments: on `meta` they become meta tensors. On `cpu` they are used as
  // they are, or copied when the caller will return before the operator runs and may change them.
  StandIns(c10::DeviceType type, bool copy_host_tensors)
      : type_(type), copy_host_tensors_(copy_host_tensors) {}

  c10::IValue of(const c10::IValue& value);
  torch::jit::Stack of(const torch::jit::Stack& values);
  at::Tensor of(const at::Tensor& tensor);

  // The argument that a result of the operator is, or undefined.
  at::Tensor argument(const at::Tensor& result) const;
  // A view of the argument whose bytes a result of the operator shares, or undefined.
  at::Tensor view_of_argument(const at::Tensor& result) const;

 private:
  c10::Storage storage_of(const c10::Storage& original);

  c10::DeviceType type_;
  bool copy_host_tensors_;
  std::unordered_map<const c10::TensorImpl*, at::Tensor> stand_ins_;    // by argument
  std::unordered_map<const c10::TensorImpl*, at::Tensor> arguments_;    // by stand-in
  std::unordered_map<const c10::StorageImpl*, c10::Storage> storages_;  // by argument's storage
  std::unordered_map<const c10::StorageImpl*, at::Tensor> owners_;      // by stand-in's storage
};

}  // namespace fake
