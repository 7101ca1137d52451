// How an operator without a kernel of its own runs on the fake accelerator (fake_fallback.cpp).
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>

#include <map>
#include <string>

namespace fake {

// The boxed fallback of dispatch key PrivateUse1.
void run_operator(const c10::OperatorHandle& op, torch::jit::Stack* stack);

// An operator whose meta kernel failed: it waited for its own stream.
struct SyncFallback {
  int64_t num_calls = 0;
  std::string reason;  // of the latest call
};
std::map<std::string, SyncFallback> sync_fallbacks();
void clear_sync_fallbacks();

// The same bytes seen as a CPU tensor; owns nothing.
at::Tensor cpu_alias(const at::Tensor& tensor);
// A tensor on the fake device; the bytes are poison.
at::Tensor empty_strided(at::IntArrayRef sizes, at::IntArrayRef strides, at::ScalarType dtype,
                         at::Device device);

}  // namespace fake
