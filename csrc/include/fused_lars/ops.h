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

// The tensors of a step. The first group_sizes[0] parameters belong to groups[0], the next group_sizes[1] to
// groups[1], and so on. Each of the state lists holds a tensor for exactly the parameters that need one, in
// order:
//   momentum_buffers  where the group has momentum > 0: of the parameter's dtype or fp32; of an fp32
//   parameter
//                     also bf16 or fp16; of all but an fp64 parameter also int8
//   master_params     where the group has master_weights and the parameter is fp16 or bf16: fp32
//   steps             where the group has momentum > 0 and dampening > 0: one fp32 element, at first 0
//   momentum_scales   where the momentum buffer is int8: an fp32 vector, one element for each 128 of the
//                     buffer, in the order of its memory
//   rng_states        where something is rounded stochastically: an int8 buffer; a 16-bit buffer of an fp32
//                     parameter or master; what is 16-bit in a group with stochastic_rounding. An int64
//                     vector of three: key, updates applied so far, index of the tensor's first element
struct StepLists {
  at::TensorList params, grads, momentum_buffers = {}, master_params = {}, steps = {}, momentum_scales = {},
                                rng_states = {};
  at::IntArrayRef group_sizes = {};
};

// torch.ops.fused_lars.step_ for C++: one fused step over all groups, in place, through the dispatcher. A
// tensor that is written may not share memory with another tensor of the step. If this throws an Error,
// nothing has changed.
FUSED_LARS_API void step_(const StepLists& lists, const std::vector<Hyperparameters>& groups,
                          const StepOptions& options = {});

// torch.ops.fused_lars.squared_norms for C++. Returns an fp64 tensor (n, 2); row i is |params[i]|^2 and
// |grads[i]|^2. fp64 cannot hold the square of an fp64 norm that is larger than about 1e150 or smaller than
// 1e-150: it is inf, or 0.
FUSED_LARS_API at::Tensor squared_norms(at::TensorList params, at::TensorList grads);

}  // namespace fused_lars
