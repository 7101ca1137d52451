// Every operator that needs no kernel of its own, asynchronously: metadata from its meta kernel,
// outputs allocated at once, the CPU kernel run later on the current stream's worker, in place on
// the fake device's bytes. The caller runs ahead, as it does of a GPU, so a range that is refilled
// while an operator still reads it gives wrong values.
//
// An operator waits for its stream (never for other streams) when the caller needs values: scalar
// results, shapes that depend on data, random numbers (drawn from the CPU's generator, in the
// caller's order). One whose meta kernel fails waits too, and is counted.

#include "fake_fallback.h"

#include "fake_memory.h"
#include "fake_streams.h"
#include "op_facts.h"
#include "stand_ins.h"

#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/new_empty.h>
#include <ATen/ops/resize.h>
#include <c10/core/DeviceGuard.h>

#include <exception>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

namespace fake {
namespace {

using at::Tensor;
using c10::IValue;
using c10::OperatorHandle;
using torch::jit::Stack;

struct SyncFallbacks {
  std::mutex mutex;
  std::map<std::string, SyncFallback> by_name;
};
SyncFallbacks& fallbacks() {
  static auto* instance = new SyncFallbacks;
  return *instance;
}

void count_sync_fallback(const OperatorHandle& op, const char* reason) {
  std::lock_guard lock(fallbacks().mutex);
  SyncFallback& entry = fallbacks().by_name[name_of(op)];
  ++entry.num_calls;
  entry.reason = reason;
}

// Applies change(tensor) to every tensor of a result, undefined ones included.
template <typename Change>
IValue map_tensors(const IValue& value, Change change) {
  if (value.isTensor()) {
    return change(value.toTensor());
  }
  if (value.isTensorList()) {
    c10::List<Tensor> list;
    for (const Tensor& tensor : value.toTensorVector()) {
      list.push_back(change(tensor));
    }
    return list;
  }
  return value;
}

// An out= argument takes the size of its result, as everywhere in PyTorch.
void resize_like(const Tensor& tensor, const Tensor& stand_in) {
  if (tensor.sizes() != stand_in.sizes()) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    tensor.resize_(stand_in.sizes());
    tensor.unsafeGetTensorImpl()->set_sizes_and_strides(stand_in.sizes(), stand_in.strides());
  }
}

Tensor empty_like_result(const Tensor& result, c10::Device device) {
  if (result.is_non_overlapping_and_dense()) {
    return empty_strided(result.sizes(), result.strides(), result.scalar_type(), device);
  }
  // An expanded result has no memory of that shape to write to.
  return empty_strided(result.sizes(), result.new_empty(result.sizes()).strides(),
                       result.scalar_type(), device);
}

void call_on_cpu(const OperatorHandle& op, Stack& stack) {
  static thread_local const bool threads_set = (at::init_num_threads(), true);
  (void)threads_set;
  at::NoGradGuard no_grad;
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  op.callBoxed(&stack);
}

// Empty when the operator's meta kernel fails. Meta kernels may be Python, so this runs on the
// caller.
std::optional<Stack> call_on_meta(const OperatorHandle& op, const Stack& args, StandIns& meta) {
  Stack stack = meta.of(args);
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  try {
    op.callBoxed(&stack);
  } catch (const std::exception& error) {
    count_sync_fallback(op, error.what());  // wrong arguments fail again, with the CPU's message
    return std::nullopt;
  }
  return stack;
}

// ------------------------------------------------------------------------------------------------
// Now, while the caller waits

Stack run_waiting(const OperatorHandle& op, const Stack& args, c10::Device device) {
  StandIns cpu(c10::kCPU, /*copy_host_tensors=*/false);
  Stack stack = cpu.of(args);
  std::exception_ptr error;
  StreamQueue& queue = current_queue(device.index());
  queue.enqueue([&] {
    try {
      call_on_cpu(op, stack);
    } catch (...) {
      error = std::current_exception();
    }
  });
  queue.synchronize();
  if (error) {
    std::rethrow_exception(error);
  }
  for_each_written(op, args, [&](const Tensor& tensor) {
    const Tensor stand_in = cpu.of(tensor);
    if (tensor.is_privateuseone() && stand_in.const_data_ptr() != tensor.const_data_ptr()) {
      resize_like(tensor, stand_in);
      cpu_alias(tensor).copy_(stand_in);
    }
  });
  Stack results;
  for (const IValue& result : stack) {
    results.push_back(map_tensors(result, [&](const Tensor& tensor) {
      if (!tensor.defined()) {
        return tensor;
      }
      if (Tensor argument = cpu.argument(tensor); argument.defined()) {
        return argument;
      }
      if (Tensor view = cpu.view_of_argument(tensor); view.defined()) {
        return view;
      }
      Tensor fresh = empty_like_result(tensor, device);
      cpu_alias(fresh).copy_(tensor);
      return fresh;
    }));
  }
  return results;
}

// ------------------------------------------------------------------------------------------------
// Later, on the worker

// One operator with all that it needs until it has run. Outputs are aliases: `held` keeps their
// bytes.
struct Work {
  OperatorHandle op;
  Stack args = {};                   // CPU stand-ins
  std::vector<Tensor> outputs = {};  // in the order of results; undefined: not fresh
  std::vector<std::shared_ptr<const void>> held = {};
  double delay_seconds = delays().body_seconds;  // as it is now, not when the worker gets here

  void hold_bytes(const Tensor& tensor) {
    if (tensor.is_privateuseone()) {
      held.push_back(hold(tensor.storage().data_ptr()));
    }
  }

  void operator()() {
    sleep_seconds(delay_seconds);
    call_on_cpu(op, args);
    size_t next = 0;
    for (const IValue& result : args) {
      map_tensors(result, [&](const Tensor& tensor) {
        write(outputs.at(next++), tensor);
        return tensor;
      });
    }
  }

  void write(const Tensor& output, const Tensor& result) const {
    if (output.defined() && result.defined()) {
      // Types may differ: layer_norm's statistics are float elsewhere, bfloat16 on the CPU.
      TORCH_CHECK(output.sizes() == result.sizes(), "meta kernel of ", name_of(op),
                  " promised sizes ", output.sizes(), " but the CPU kernel made ", result.sizes());
      at::NoGradGuard no_grad;
      at::AutoDispatchBelowADInplaceOrView below_autograd;
      output.copy_(result);
    }
  }
};

Stack run_later(const OperatorHandle& op, const Stack& args, c10::Device device, StandIns& meta,
                const Stack& meta_results) {
  Work work{op};
  bool has_work = false;
  for_each_written(op, args, [&](const Tensor& tensor) {
    has_work = true;
    resize_like(tensor, meta.of(tensor));
  });
  Stack results;
  for (const IValue& result : meta_results) {
    results.push_back(map_tensors(result, [&](const Tensor& tensor) {
      work.outputs.emplace_back();
      if (!tensor.defined()) {
        return tensor;
      }
      if (Tensor argument = meta.argument(tensor); argument.defined()) {
        return argument;
      }
      if (Tensor view = meta.view_of_argument(tensor); view.defined()) {
        return view;
      }
      Tensor fresh = empty_like_result(tensor, device);
      has_work = true;
      work.outputs.back() = cpu_alias(fresh);
      work.hold_bytes(fresh);
      return fresh;
    }));
  }
  if (has_work) {  // else the operator only makes views
    work.args = StandIns(c10::kCPU, /*copy_host_tensors=*/true).of(args);
    for (const IValue& arg : args) {
      for_each_tensor(arg, [&](const Tensor& tensor) { work.hold_bytes(tensor); });
    }
    current_queue(device.index()).enqueue(std::move(work));
  }
  return results;
}

}  // namespace

void run_operator(const OperatorHandle& op, Stack* stack) {
  const size_t num_args = op.schema().arguments().size();
  Stack args(stack->end() - static_cast<std::ptrdiff_t>(num_args), stack->end());
  const c10::Device device = common_device(op, args);
  bool writes_host = false;
  for_each_written(op, args, [&](const Tensor& tensor) { writes_host |= tensor.is_cpu(); });

  Stack results;
  if (writes_host || needs_values(op, args)) {
    results = run_waiting(op, args, device);
  } else {
    StandIns meta(c10::kMeta, /*copy_host_tensors=*/false);
    if (auto meta_results = call_on_meta(op, args, meta)) {
      results = run_later(op, args, device, meta, *meta_results);
    } else {
      results = run_waiting(op, args, device);
    }
  }
  torch::jit::drop(*stack, num_args);
  for (IValue& result : results) {
    stack->push_back(std::move(result));
  }
}

std::map<std::string, SyncFallback> sync_fallbacks() {
  std::lock_guard lock(fallbacks().mutex);
  return fallbacks().by_name;
}

void clear_sync_fallbacks() {
  std::lock_guard lock(fallbacks().mutex);
  fallbacks().by_name.clear();
}

Tensor cpu_alias(const Tensor& tensor) {
  if (tensor.is_cpu()) {
    return tensor;
  }
  return StandIns(c10::kCPU, /*copy_host_tensors=*/false).of(tensor);
}

Tensor empty_strided(at::IntArrayRef sizes, at::IntArrayRef strides, at::ScalarType dtype,
                     at::Device device) {
  c10::DeviceGuard guard(device);
  constexpr c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);
  return at::detail::empty_strided_generic(sizes, strides, device_allocator(), keys, dtype);
}

}  // namespace fake
