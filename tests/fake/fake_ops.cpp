// The operators that need kernels of their own on the fake accelerator: allocation, metadata,
// copies. All others take the boxed fallback (fake_fallback.cpp).

#include "fake_fallback.h"
#include "fake_memory.h"
#include "fake_streams.h"

#include <ATen/EmptyTensor.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/grad_mode.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <utility>

namespace fake {
namespace {

using at::IntArrayRef;
using at::Tensor;

constexpr c10::DispatchKeySet kKeys(c10::DispatchKey::PrivateUse1);

Tensor empty_memory_format(IntArrayRef size, std::optional<at::ScalarType> dtype,
                           std::optional<at::Layout> /*layout*/, std::optional<at::Device> device,
                           std::optional<bool> /*pin_memory*/,
                           std::optional<at::MemoryFormat> format) {
  c10::DeviceGuard guard(c10::device_or_default(device));
  return at::detail::empty_generic(size, device_allocator(), kKeys, c10::dtype_or_default(dtype),
                                   format);
}

Tensor empty_strided_options(IntArrayRef size, IntArrayRef stride,
                             std::optional<at::ScalarType> dtype,
                             std::optional<at::Layout> /*layout*/, std::optional<at::Device> device,
                             std::optional<bool> /*pin_memory*/) {
  return empty_strided(size, stride, c10::dtype_or_default(dtype), c10::device_or_default(device));
}

// ------------------------------------------------------------------------------------------------
// Copies

// A copy with all that it needs until it has run. `host` is the tensor on the host's side, if there
// is one: PyTorch's own pinned allocator protects it in the same way. Wrapped memory stays
// unprotected.
struct Copy {
  Tensor from;  // CPU aliases
  Tensor to;
  Tensor host;
  std::shared_ptr<const void> held_from;
  std::shared_ptr<const void> held_to;
  double delay_seconds;

  void operator()() const {
    sleep_seconds(delay_seconds);
    at::NoGradGuard no_grad;
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    to.copy_(from);
  }
};

// On which stream, as on CUDA: host to device on the destination's current stream, device to host
// and between two devices on the source's. Blocking calls wait for that stream. Unlike CUDA, host
// memory that is not pinned is copied asynchronously too.
Tensor copy_from(const Tensor& self, const Tensor& dst, bool non_blocking) {
  const bool touches_host = self.is_cpu() || dst.is_cpu();
  const at::Device device = self.is_cpu() ? dst.device() : self.device();
  StreamQueue& queue = current_queue(device.index());
  const bool is_peer_copy = !touches_host && self.device() != dst.device();
  if (is_peer_copy) {
    // Both devices' streams meet before and after, as in CUDA's copy_: neither side may notice that
    // the copy ran on one stream only. This serialises them; an engine should copy in another way.
    Event destination_is_free;
    destination_is_free.record(current_queue(dst.device().index()));
    destination_is_free.block(queue);
  }
  queue.enqueue(Copy{cpu_alias(self), cpu_alias(dst),
                     self.is_cpu()  ? self
                     : dst.is_cpu() ? dst
                                    : Tensor(),
                     self.is_cpu() ? nullptr : hold(self.storage().data_ptr()),
                     dst.is_cpu() ? nullptr : hold(dst.storage().data_ptr()),
                     delays().copy_seconds_per_copy +
                         delays().copy_seconds_per_byte * static_cast<double>(dst.nbytes())});
  if (is_peer_copy) {
    Event copied;
    copied.record(queue);
    copied.block(current_queue(dst.device().index()));
  }
  if (touches_host && !non_blocking) {
    queue.synchronize();
  }
  return dst;
}

Tensor copy_from_and_resize(const Tensor& self, const Tensor& dst) {
  dst.resize_(self.sizes());
  return dst.copy_(self);
}

// ------------------------------------------------------------------------------------------------
// Metadata

const Tensor& resize_(const Tensor& self, IntArrayRef size,
                      std::optional<at::MemoryFormat> format) {
  auto* impl = self.unsafeGetTensorImpl();
  const size_t needed_bytes =
      at::detail::computeStorageNbytesContiguous(size, self.itemsize(), self.storage_offset());
  if (needed_bytes > self.storage().nbytes() && c10::multiply_integers(size) > 0) {
    at::detail::getPrivateUse1Hooks().resizePrivateUse1Bytes(self.storage(), needed_bytes);
  }
  impl->set_sizes_contiguous(size);
  if (format && *format != at::MemoryFormat::Preserve) {
    impl->empty_tensor_restride(*format);
  }
  return self;
}

Tensor view(const Tensor& self, IntArrayRef size) { return at::native::view(self, size); }

Tensor as_strided(const Tensor& self, IntArrayRef size, IntArrayRef stride,
                  std::optional<int64_t> offset) {
  return at::native::as_strided_tensorimpl(self, size, stride, offset);
}

Tensor& set_storage_offset(Tensor& self, at::Storage source, int64_t offset, IntArrayRef size,
                           IntArrayRef stride) {
  return at::native::set_storage_cpu_(self, std::move(source), offset, size, stride);
}

Tensor& set_storage(Tensor& self, at::Storage source) {
  const auto numel = static_cast<int64_t>(source.nbytes() / self.itemsize());
  return at::native::set_storage_cpu_(self, std::move(source), 0, {numel}, {});
}

Tensor& set_tensor(Tensor& self, const Tensor& source) {
  return at::native::set_storage_cpu_(self, source.storage(), source.storage_offset(),
                                      source.sizes(), source.strides());
}

void record_stream(Tensor& /*self*/, c10::Stream /*stream*/) {
  // Every task holds the allocations that it uses.
}

}  // namespace

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty_memory_format);
  m.impl("empty_strided", &empty_strided_options);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("resize_", &resize_);
  m.impl("view", &view);
  m.impl("as_strided", &as_strided);
  m.impl("set_.source_Storage_storage_offset", &set_storage_offset);
  m.impl("set_.source_Storage", &set_storage);
  m.impl("set_.source_Tensor", &set_tensor);
  m.impl("record_stream", &record_stream);

  // Composites that take another path on the CPU than on a foreign device: run whole, they give the
  // CPU's bits. (Every operator with both a CPU and a composite kernel, and two that ask for the
  // device.)
  for (const char* name : {"_stack", "_stack.out", "addr", "addr.out", "convolution",
                           "linalg__powsum", "native_channel_shuffle", "native_group_norm",
                           "native_layer_norm", "scaled_dot_product_attention"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&run_operator>());
  }
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&run_operator>());
}

}  // namespace fake
