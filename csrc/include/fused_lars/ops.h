#pragma once

#include <optional>
#include <vector>

#include <ATen/core/Tensor.h>

#include "fused_lars/export.h"
#include "fused_lars/hyperparameters.h"

namespace fused_lars {

// What a step may be given beside its lists. The comment on the schema in csrc/ops.cpp explains each.
//
// workspace is scratch memory that a caller keeps for the CUDA step: an int32 tensor of one dimension and any
// size, made by torch::zeros. Only these ops may write it, one at a time. A step leaves it zero, and may set
// it to larger memory. No step can check that it is zero: if it is not, the kernel hangs or does nothing.
struct StepOptions {
  std::optional<at::Tensor> squared_norms = {};
  std::optional<at::Tensor> grad_scale = {};
  std::optional<at::Tensor> found_inf = {};
  std::optional<at::Tensor> trust_ratios = {};
  std::optional<at::Tensor> layer_norms = {};
  std::optional<at::Tensor> workspace = {};
  bool masters_follow = false;
};

// torch.ops.fused_lars.step_ for C++: one fused step over all groups, in place, through the dispatcher. The
// first group_sizes[0] parameters belong to groups[0], the next group_sizes[1] to groups[1], and so on. Each
// of the three state lists holds a tensor for exactly the parameters that need one, in order:
//   momentum_buffers  where the group has momentum > 0
//   master_params     where the group has master_weights and the parameter is fp16 or bf16
//   steps             where the group has momentum > 0 and dampening > 0
// A tensor that is written may not share memory with another tensor of the step. If this throws an Error,
// nothing has changed.
FUSED_LARS_API void step_(at::TensorList params, at::TensorList grads, at::TensorList momentum_buffers,
                          at::TensorList master_params, at::TensorList steps, at::IntArrayRef group_sizes,
                          const std::vector<Hyperparameters>& groups, const StepOptions& options = {});

// torch.ops.fused_lars.squared_norms for C++. Returns an fp64 tensor (n, 2); row i is |params[i]|^2 and
// |grads[i]|^2. fp64 cannot hold the square of an fp64 norm that is larger than about 1e150 or smaller than
// 1e-150: it is inf, or 0.
FUSED_LARS_API at::Tensor squared_norms(at::TensorList params, at::TensorList grads);

}  // namespace fused_lars
