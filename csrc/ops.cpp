// The two custom ops. Nothing else includes the dispatcher.
//
// acquire_ before and release_ after each leaf module that holds weights. `token` is one tiny
// tensor per session, claimed mutated by both: it alone puts all of them into program order when a
// compiler traces the model. `w` is claimed mutated because its bytes may arrive only now; `out` so
// that no work that reads a weight can move behind the release. None of them is written here.

#include <ATen/core/Tensor.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/library.h>

#ifdef BS_WITH_GPU
#include <c10/cuda/CUDAStream.h>
#endif

#include "binding.h"
#include "error.h"

namespace blockswap {

constexpr const char* kAcquire = "acquire_(Tensor(a!) token, Tensor(b!)[] w) -> ()";
constexpr const char* kRelease = "release_(Tensor(a!) token, Tensor(b!)[] out, Tensor[] w) -> ()";

namespace {

void refuse_grad(const char* op, at::TensorList tensors) {
  if (!c10::GradMode::is_enabled()) {
    return;
  }
  for (const at::Tensor& tensor : tensors) {
    TORCH_CHECK(!tensor.requires_grad(), "blockswap::", op,
                ": a tensor requires grad and grad mode is on; streamed weights are gone when "
                "backward would read them: run under torch.no_grad() or torch.inference_mode()");
  }
}

void acquire_(const at::Tensor& token, at::TensorList w) {
  refuse_grad("acquire_", w);
  if (Binding* binding = Binding::find(token)) {
    binding->acquire(w, current_stream(token.device()));
  }
}

void release_(const at::Tensor& token, at::TensorList out, at::TensorList w) {
  refuse_grad("release_", w);
  refuse_grad("release_", out);
  if (Binding* binding = Binding::find(token)) {
    binding->release(w, current_stream(token.device()));
  }
}

void acquire_meta(const at::Tensor&, at::TensorList) {}
void release_meta(const at::Tensor&, at::TensorList, at::TensorList) {}

template <typename Signature>
c10::TypedOperatorHandle<Signature> find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

}  // namespace

void call_acquire(const at::Tensor& token, at::TensorList w) {
  static const auto op = find_op<void(const at::Tensor&, at::TensorList)>("blockswap::acquire_");
  op.call(token, w);
}

void call_release(const at::Tensor& token, at::TensorList out, at::TensorList w) {
  static const auto op =
      find_op<void(const at::Tensor&, at::TensorList, at::TensorList)>("blockswap::release_");
  op.call(token, out, w);
}

Device::Stream current_stream(const c10::Device& device) {
  if (device.is_cpu()) {
    return Device::Stream{0};
  }
#ifdef BS_WITH_GPU
  if (device.is_cuda()) {
    const cudaStream_t stream = c10::cuda::getCurrentCUDAStream(device.index()).stream();
    return Device::Stream{reinterpret_cast<uint64_t>(stream)};
  }
#endif
  const c10::impl::VirtualGuardImpl guard(device.type());
  return Device::Stream{static_cast<uint64_t>(guard.getStream(device).id())};
}

}  // namespace blockswap

TORCH_LIBRARY(blockswap, m) {
  m.def(blockswap::kAcquire, {at::Tag::pt2_compliant_tag});
  m.def(blockswap::kRelease, {at::Tag::pt2_compliant_tag});
}

#define BS_IMPLEMENT(key)                     \
  TORCH_LIBRARY_IMPL(blockswap, key, m) {     \
    m.impl("acquire_", &blockswap::acquire_); \
    m.impl("release_", &blockswap::release_); \
  }
BS_IMPLEMENT(CPU)
BS_IMPLEMENT(CUDA)
BS_IMPLEMENT(PrivateUse1)
#undef BS_IMPLEMENT

// They have no gradient, and refuse to be part of one: autograd has nothing to do here.
TORCH_LIBRARY_IMPL(blockswap, Autograd, m) {
  m.impl("acquire_", torch::CppFunction::makeFallthrough());
  m.impl("release_", torch::CppFunction::makeFallthrough());
}

// Without a kernel for Meta the real one may run while a compiler traces.
TORCH_LIBRARY_IMPL(blockswap, Meta, m) {
  m.impl("acquire_", &blockswap::acquire_meta);
  m.impl("release_", &blockswap::release_meta);
}
