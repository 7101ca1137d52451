// What can be told about a call from the operator's schema and its arguments, before it runs.
#pragma once

#include "stand_ins.h"

#include <ATen/core/dispatch/Dispatcher.h>

#include <string>

namespace fake {

std::string name_of(const c10::OperatorHandle& op);

// The device of the arguments. As on CUDA, a forgotten move to the device is an error: only host
// scalars, and host indices, may be mixed in.
c10::Device common_device(const c10::OperatorHandle& op, const torch::jit::Stack& args);

// The caller needs values, not only metadata: scalar results, shapes that depend on data, random
// numbers.
bool needs_values(const c10::OperatorHandle& op, const torch::jit::Stack& args);

// Calls visit(tensor) for each argument that the operator writes to.
template <typename Visit>
void for_each_written(const c10::OperatorHandle& op, const torch::jit::Stack& args, Visit visit) {
  for (size_t i = 0; i < args.size(); ++i) {
    const auto* alias = op.schema().arguments()[i].alias_info();
    if (alias != nullptr && alias->isWrite()) {
      for_each_tensor(args[i], visit);
    }
  }
}

}  // namespace fake
