#include "stand_ins.h"

#include <ATen/ops/clone.h>
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#include <utility>

namespace fake {
namespace {

// A Python number promotes types less than a tensor does, and only a scalar tensor may say that it
// is one.
void keep_wrapped_number(const at::Tensor& tensor, const at::Tensor& like) {
  if (like.unsafeGetTensorImpl()->is_wrapped_number()) {
    tensor.unsafeGetTensorImpl()->set_wrapped_number(true);
  }
}

at::Tensor make_tensor(c10::Storage storage, c10::DispatchKeySet keys, const at::Tensor& like) {
  auto tensor = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), keys, like.dtype());
  c10::TensorImpl* impl = tensor.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  keep_wrapped_number(tensor, like);
  impl->_set_conj(like.is_conj());
  impl->_set_neg(like.is_neg());
  return tensor;
}

c10::DispatchKeySet keys_of(c10::DeviceType type) {
  return c10::DispatchKeySet(type == c10::kMeta  ? c10::DispatchKey::Meta
                             : type == c10::kCPU ? c10::DispatchKey::CPU
                                                 : c10::DispatchKey::PrivateUse1);
}

}  // namespace

c10::Storage StandIns::storage_of(const c10::Storage& original) {
  auto [found, is_new] = storages_.try_emplace(original.unsafeGetStorageImpl());
  if (is_new) {
    // Resizable: an out= argument may grow; the caller then resizes the argument itself. The CPU
    // stand-in borrows its bytes and never frees them.
    void* bytes = type_ == c10::kCPU ? original.mutable_data() : nullptr;
    found->second = c10::Storage(c10::Storage::use_byte_size_t{}, original.nbytes(),
                                 c10::DataPtr(bytes, c10::Device(type_)), c10::GetAllocator(type_),
                                 /*resizable=*/true);
  }
  return found->second;
}

at::Tensor StandIns::of(const at::Tensor& tensor) {
  if (!tensor.defined()) {
    return tensor;
  }
  auto [found, is_new] = stand_ins_.try_emplace(tensor.unsafeGetTensorImpl());
  at::Tensor& result = found->second;
  if (!is_new) {
    return result;
  }
  TORCH_CHECK_NOT_IMPLEMENTED(tensor.has_storage(), "the fake device has no tensors of layout ",
                              tensor.layout());
  if (type_ == c10::kCPU && tensor.is_cpu()) {
    result = copy_host_tensors_ ? tensor.clone() : tensor;
    keep_wrapped_number(result, tensor);
  } else if (type_ == c10::kMeta && tensor.unsafeGetTensorImpl()->is_wrapped_number()) {
    result = tensor;  // Python meta kernels want to read the number
  } else {
    result = make_tensor(storage_of(tensor.storage()), keys_of(type_), tensor);
    owners_.try_emplace(result.storage().unsafeGetStorageImpl(), tensor);
  }
  arguments_.try_emplace(result.unsafeGetTensorImpl(), tensor);
  return result;
}

c10::IValue StandIns::of(const c10::IValue& value) {
  if (value.isTensor()) {
    return of(value.toTensor());
  }
  if (value.isTensorList()) {
    c10::List<at::Tensor> list;
    for (const at::Tensor& tensor : value.toTensorVector()) {
      list.push_back(of(tensor));
    }
    return list;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> list;
    for (const c10::IValue& element : value.toListRef()) {
      list.push_back(element.isNone() ? std::nullopt
                                      : std::optional<at::Tensor>(of(element.toTensor())));
    }
    return list;
  }
  if (value.isDevice() && value.toDevice().is_privateuseone()) {
    return c10::Device(type_);
  }
  return value;
}

torch::jit::Stack StandIns::of(const torch::jit::Stack& values) {
  torch::jit::Stack result;
  result.reserve(values.size());
  for (const c10::IValue& value : values) {
    result.push_back(of(value));
  }
  return result;
}

at::Tensor StandIns::argument(const at::Tensor& result) const {
  auto found = arguments_.find(result.unsafeGetTensorImpl());
  return found == arguments_.end() ? at::Tensor() : found->second;
}

at::Tensor StandIns::view_of_argument(const at::Tensor& result) const {
  auto found = owners_.find(result.storage().unsafeGetStorageImpl());
  if (found == owners_.end()) {
    return {};
  }
  return make_tensor(found->second.storage(), keys_of(c10::kPrivateUse1), result);
}

}  // namespace fake
