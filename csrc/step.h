#pragma once

// What a backend gets: a step whose arguments have all been checked (checks.h). A backend only computes.

#include <cstdint>
#include <vector>

#include <ATen/core/Tensor.h>

#include "element.h"
#include "fused_lars/hyperparameters.h"

namespace fused_lars {

// One parameter with its gradient and state. In a fused backend all defined tensors but `step` have the same
// sizes and strides, are dense and do not overlap themselves (dense.h). So it treats each of them as a run of
// numel elements.
struct StepTensor {
  at::Tensor param;            // fp32, fp64, fp16 or bf16
  at::Tensor grad;             // the parameter's dtype, or fp32
  at::Tensor momentum_buffer;  // see momentum_dtypes; undefined without momentum
  at::Tensor master_param;     // fp32; undefined unless an fp16 or bf16 parameter has one
  at::Tensor step;             // one fp32 element, the updates applied so far; undefined without dampening
  at::Tensor momentum_scale;   // fp32, one for each block of an int8 buffer (rounding.h); else undefined
  at::Tensor rng_state;        // int64 (3), see RngState; undefined if nothing is rounded stochastically
  int64_t group;

  // The tensor that the rule reads and writes. With a master, `param` only receives the rounded result.
  const at::Tensor& weight() const { return master_param.defined() ? master_param : param; }
};

struct Step {
  std::vector<StepTensor> tensors;
  std::vector<Hyperparameters> groups;
  // Empty, or one tensor for each group, which replaces the group's lr if it is defined: one floating-point
  // element on the CPU or on the parameters' device.
  std::vector<at::Tensor> lr_tensors;
  at::Tensor squared_norms;  // optional input (n, 2): the result of a NormKernel
  at::Tensor grad_scale;     // optional input, one fp32 element: what gradients were multiplied by
  at::Tensor found_inf;      // optional input, one fp32 element: if it is not 0, nothing changes
  at::Tensor trust_ratios;   // optional output (n): the trust ratio of each parameter
  at::Tensor layer_norms;    // optional output (n, 2): |w| and unscaled_grad_norm (rule.h) of each parameter
  at::Tensor workspace;      // optional int32 scratch: see the schema in ops.cpp
  bool masters_follow = false;  // masters take over what was written into their parameters (take_over)
};

// Which state a parameter needs. The state lists of an op hold a tensor for exactly the parameters that need
// one. LARS in Python makes state by the same conditions (torch_ext/fused_lars/_gather.py), because it has to
// make it before the op is called. If the two differ, the lists of a step have wrong lengths, and the op
// refuses it (checks.cpp).
inline bool needs_momentum_buffer(const Hyperparameters& group) { return group.momentum > 0.0; }
inline bool needs_step(const Hyperparameters& group) { return group.momentum > 0.0 && group.dampening > 0.0; }
inline bool is_half(at::ScalarType dtype) { return dtype == at::kHalf || dtype == at::kBFloat16; }
inline bool needs_master(const Hyperparameters& group, at::ScalarType param) {
  return group.master_weights && is_half(param);
}
inline bool needs_momentum_scale(const at::Tensor& momentum_buffer) {
  return momentum_buffer.defined() && momentum_buffer.scalar_type() == at::kChar;
}

// Which tensors of a step are rounded stochastically: those that hold a result in fewer bits than it was
// computed in and are read again by the next step. A buffer of the weight's own type is rounded as the weight
// is. A parameter that has a master is rounded to nearest, since it is not read again.
inline bool rounds_weight_stochastically(const Hyperparameters& group, at::ScalarType weight) {
  return group.stochastic_rounding && is_half(weight);
}
inline bool rounds_momentum_stochastically(const Hyperparameters& group, at::ScalarType weight,
                                           at::ScalarType momentum_buffer) {
  if (momentum_buffer == at::kChar) return true;
  return is_half(momentum_buffer) && (!is_half(weight) || group.stochastic_rounding);
}
inline bool needs_rng_state(const Hyperparameters& group, at::ScalarType weight,
                            const at::Tensor& momentum_buffer) {
  return rounds_weight_stochastically(group, weight) ||
         (momentum_buffer.defined() &&
          rounds_momentum_stochastically(group, weight, momentum_buffer.scalar_type()));
}

// The dtypes that the momentum buffer of a parameter may have. int8 (Char) comes with scales.
inline at::ArrayRef<at::ScalarType> momentum_dtypes(at::ScalarType param) {
  static constexpr at::ScalarType of_double[] = {at::kDouble, at::kFloat};
  static constexpr at::ScalarType of_float[] = {at::kFloat, at::kBFloat16, at::kHalf, at::kChar};
  static constexpr at::ScalarType of_half[] = {at::kHalf, at::kFloat, at::kChar};
  static constexpr at::ScalarType of_bfloat16[] = {at::kBFloat16, at::kFloat, at::kChar};
  if (param == at::kDouble) return of_double;
  if (param == at::kHalf) return of_half;
  if (param == at::kBFloat16) return of_bfloat16;
  return of_float;
}

// The dtype of norms and trust ratios: fp64, or fp32 on a device without fp64.
at::ScalarType norm_dtype(at::Device device);

// The element type of a checked tensor.
Element element(const at::Tensor& tensor);

// After a step, each element of `param` is the rounded element of `master`. An element that is not was
// written by someone else, and is copied to the master. The other elements of the master keep their low bits.
// The elements are compared as bits, because a written -0 is not the same as 0. Where `skip` is defined and
// true, nothing changes.
void take_over(const at::Tensor& param, const at::Tensor& master, const at::Tensor& skip = {});

// Moves each lr tensor on the host into its group as a number. Those on a device stay in step.lr_tensors.
void fold_host_lr(Step& step);

// The backends. Each applies the rule to every parameter of a checked step.
void step_reference(const Step& step);
void step_cpu(const Step& step);
void step_cuda(const Step& step);

// A call for norms alone. In a fused backend its tensors are dense (dense.h).
struct NormCall {
  std::vector<at::Tensor> params, grads;
  std::vector<Hyperparameters> groups;  // of which decayed_norm, weight_decay and maximize are used
  std::vector<int64_t> group_of;        // each parameter's group
  at::Tensor grad_scale;                // as in Step
  at::Tensor workspace;                 // as in Step
};

// Returns a tensor (n, 2) of norm_dtype. Row i is |params[i]|^2 and |grads[i]|^2. With decayed_norm the
// second is the square of |g' + weight_decay * w|.
using NormKernel = at::Tensor (*)(const NormCall& call);
at::Tensor squared_norms_reference(const NormCall& call);
at::Tensor squared_norms_cpu(const NormCall& call);
at::Tensor squared_norms_cuda(const NormCall& call);

}  // namespace fused_lars
