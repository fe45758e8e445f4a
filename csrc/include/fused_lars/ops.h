#pragma once

#include <optional>
#include <vector>

#include <ATen/core/Tensor.h>

#include "fused_lars/export.h"
#include "fused_lars/hyperparameters.h"

namespace fused_lars {

// What a step may be given beyond its lists; see the schema in csrc/ops.cpp.
//
// workspace is scratch that a caller keeps for the CUDA step: int32, one dimension, any size, torch::zeros
// where it is made, and left alone by all but these ops, of which one at a time uses it. Steps leave it
// clean, and may set it to larger memory. Values that are not zero are not noticed: the kernel then hangs or
// does nothing.
struct StepOptions {
  std::optional<at::Tensor> squared_norms = {};
  std::optional<at::Tensor> grad_scale = {};
  std::optional<at::Tensor> found_inf = {};
  std::optional<at::Tensor> trust_ratios = {};
  std::optional<at::Tensor> layer_norms = {};
  std::optional<at::Tensor> workspace = {};
};

// torch.ops.fused_lars.step_ for C++: one fused step over all groups, in place, through the dispatcher.
// `group_sizes[i]` of the parameters, in order, belong to `groups[i]`. The three state lists hold a tensor
// for exactly the parameters that need one, in order:
//   momentum_buffers  where the group has momentum > 0
//   master_params     where the group has master_weights and the parameter is fp16 or bf16
//   steps             where the group has momentum > 0 and dampening > 0
// Nothing that is written may share memory with another tensor of the step. Throws an Error before anything
// has changed.
FUSED_LARS_API void step_(at::TensorList params, at::TensorList grads, at::TensorList momentum_buffers,
                          at::TensorList master_params, at::TensorList steps, at::IntArrayRef group_sizes,
                          const std::vector<Hyperparameters>& groups, const StepOptions& options = {});

// torch.ops.fused_lars.squared_norms: (n, 2), fp64, row i is |params[i]|^2 and |grads[i]|^2.
// The square of an fp64 norm beyond 1e+-150 leaves fp64: it is inf, or 0.
FUSED_LARS_API at::Tensor squared_norms(at::TensorList params, at::TensorList grads);

}  // namespace fused_lars
