#pragma once

// What a backend is handed: a step whose arguments have all been checked (ops.cpp), so that a backend
// only computes.

#include <cstdint>
#include <vector>

#include <ATen/core/Tensor.h>

#include "element.h"
#include "fused_lars/hyperparameters.h"

namespace fused_lars {

// One parameter and what its update touches. Every defined tensor but `step` has the parameter's sizes
// and strides, is dense and does not overlap itself, so a backend treats it as a run of numel elements.
struct StepTensor {
  at::Tensor param;            // fp32, fp64, fp16 or bf16
  at::Tensor grad;             // the parameter's dtype, or fp32
  at::Tensor momentum_buffer;  // the parameter's dtype, or fp32; undefined without momentum
  at::Tensor master_param;     // fp32; undefined unless an fp16 or bf16 parameter has one
  at::Tensor step;             // one fp32 element, the updates applied so far; undefined without dampening
  int64_t group;

  // The tensor that the rule reads and writes; with a master, `param` only receives the rounded result.
  const at::Tensor& weight() const { return master_param.defined() ? master_param : param; }
};

struct Step {
  std::vector<StepTensor> tensors;
  std::vector<Hyperparameters> groups;
  // One a group, or empty. A defined one (one floating-point element, on the CPU or the parameters'
  // device) replaces the group's lr.
  std::vector<at::Tensor> lr_tensors;
  at::Tensor squared_norms;  // optional (n, 2): what squared_norms_* give of each parameter
  at::Tensor grad_scale;     // optional, one fp32 element: what gradients were multiplied by
  at::Tensor found_inf;      // optional, one fp32 element: not zero means that nothing may change
  at::Tensor trust_ratios;   // optional (n): receives each parameter's trust ratio
  at::Tensor layer_norms;    // optional (n, 2): receives |w| and the unscaled norm of the gradient
  at::Tensor workspace;      // optional int32 scratch; see the schema
};

// What state a parameter keeps. The lists of an op hold a tensor for exactly the parameters that need one.
inline bool needs_momentum_buffer(const Hyperparameters& group) { return group.momentum > 0.0; }
inline bool needs_step(const Hyperparameters& group) { return group.momentum > 0.0 && group.dampening > 0.0; }
inline bool is_half(at::ScalarType dtype) { return dtype == at::kHalf || dtype == at::kBFloat16; }
inline bool needs_master(const Hyperparameters& group, at::ScalarType param) {
  return group.master_weights && is_half(param);
}

// The dtype of norms and trust ratios: fp64, or fp32 on a device without fp64.
at::ScalarType norm_dtype(at::Device device);

// The element type of a checked tensor.
Element element(const at::Tensor& tensor);

// Moves each lr tensor on the host into its group as a number. Those on a device stay in step.lr_tensors.
void fold_host_lr(Step& step);

// The backends. Each one applies the rule to every tensor of a checked step.
void step_reference(const Step& step);
void step_cpu(const Step& step);
void step_cuda(const Step& step);

// The norms alone, of dense tensors.
struct NormCall {
  std::vector<at::Tensor> params, grads;
  std::vector<Hyperparameters> groups;  // decayed_norm, and what that depends on
  std::vector<int64_t> group_of;        // each parameter's group
  at::Tensor grad_scale;                // optional; what gradients were multiplied by
  at::Tensor workspace;                 // the step's, optional
};

// (n, 2) of norm_dtype: row i is |params[i]|^2 and |grads[i]|^2 or, with decayed_norm, the square of
// |g' + weight_decay * w|.
using NormKernel = at::Tensor (*)(const NormCall& call);
at::Tensor squared_norms_reference(const NormCall& call);
at::Tensor squared_norms_cpu(const NormCall& call);
at::Tensor squared_norms_cuda(const NormCall& call);

}  // namespace fused_lars
