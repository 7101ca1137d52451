#include "op_facts.h"

#include "fake_streams.h"

#include <optional>

namespace fake {

using at::Tensor;
using c10::IValue;
using c10::OperatorHandle;
using torch::jit::Stack;

std::string name_of(const OperatorHandle& op) {
  const auto& name = op.operator_name();
  return name.overload_name.empty() ? name.name : name.name + "." + name.overload_name;
}

c10::Device common_device(const OperatorHandle& op, const Stack& args) {
  std::optional<c10::Device> device;
  std::optional<c10::Device> wanted;
  std::optional<c10::Device> other;
  for (const IValue& arg : args) {
    if (arg.isDevice() && arg.toDevice().is_privateuseone()) {
      wanted = arg.toDevice();
    }
    for_each_tensor(arg, [&](const Tensor& tensor) {
      if (tensor.is_privateuseone()) {
        other = device && *device != tensor.device() ? tensor.device() : other;
        device = device.value_or(tensor.device());
      } else if (tensor.dim() > 0 && !arg.isOptionalTensorList()) {
        other = tensor.device();
      }
    });
  }
  TORCH_CHECK(!device || !other,
              "Expected all tensors to be on the same device, but found at least two devices, ",
              *device, " and ", *other, ", in ", name_of(op));
  const c10::Device chosen = device.value_or(wanted.value_or(c10::Device(c10::kPrivateUse1)));
  const int index = chosen.has_index() ? chosen.index() : current_device();
  return c10::Device(c10::kPrivateUse1, static_cast<c10::DeviceIndex>(index));
}

namespace {

bool is_random(const OperatorHandle& op, const Stack& args) {
  if (!op.hasTag(at::Tag::nondeterministic_seeded)) {
    return false;
  }
  const auto dropout = op.schema().argumentIndexWithName("dropout_p");
  return !dropout || args[*dropout].toDouble() != 0;
}

// x[mask] and x[mask] = y: the number of true elements is a shape. The tags do not say so.
bool has_mask_index(const Stack& args) {
  bool found = false;
  for (const IValue& arg : args) {
    if (arg.isOptionalTensorList()) {
      for_each_tensor(arg, [&](const Tensor& index) {
        found |= index.scalar_type() == at::kBool || index.scalar_type() == at::kByte;
      });
    }
  }
  return found;
}

}  // namespace

bool needs_values(const OperatorHandle& op, const Stack& args) {
  for (const auto& result : op.schema().returns()) {
    if (!result.type()->isSubtypeOf(*c10::TensorType::get()) &&
        !result.type()->isSubtypeOf(*c10::ListType::ofTensors())) {
      return true;
    }
  }
  return op.hasTag(at::Tag::data_dependent_output) || op.hasTag(at::Tag::dynamic_output_shape) ||
         has_mask_index(args) || is_random(op, args);
}

}  // namespace fake
