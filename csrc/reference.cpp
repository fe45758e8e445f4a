// The step in ATen operators: slow, for any device, and followed by autograd.

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include "rule.h"
#include "step.h"

namespace fused_lars {
namespace {

at::Tensor squared_norm(const at::Tensor& tensor) {
  return tensor.to(norm_dtype(tensor.device())).square().sum();
}

// rule.h's trust_ratio on tensors, without reading a value on the host. Where a norm is 0 the quotient is
// taken of 1, so that no NaN enters the gradient of the branch that was not chosen.
at::Tensor trust_ratio(const Hyperparameters& h, const at::Tensor& lr, const at::Tensor& weight_squared_norm,
                       const at::Tensor& grad_squared_norm, const at::Tensor& grad_scale) {
  const auto one = at::ones_like(weight_squared_norm);
  auto q = one;
  if (h.layer_adaptation) {
    const auto both = (weight_squared_norm > 0).logical_and(grad_squared_norm > 0);
    const auto weight_norm = at::where(both, weight_squared_norm, one).sqrt();
    const auto grad_norm = at::where(both, grad_squared_norm, one).sqrt() / grad_scale.abs();
    q = at::where(
        both, h.trust_coefficient * weight_norm / (grad_norm + h.weight_decay * weight_norm + h.eps), one);
  }
  if (h.trust_clip)
    q = at::where((lr > 0).logical_and((q >= lr).logical_not()), q / at::where(lr > 0, lr, one), one);
  return q;
}

}  // namespace

void step_reference(const Step& step) {
  if (step.tensors.empty()) return;
  const auto device = step.tensors[0].param.device();
  const auto options = at::TensorOptions().device(device).dtype(norm_dtype(device));
  const auto scalar = [&](double value) { return at::full({}, value, options); };

  const bool may_skip = step.found_inf.defined();
  const auto skip = may_skip ? step.found_inf.reshape({}) != 0 : at::Tensor();
  const auto assign = [&](const at::Tensor& target, const at::Tensor& value) {
    target.copy_(may_skip ? at::where(skip, target.to(value.scalar_type()), value) : value);
  };
  const auto grad_scale = step.grad_scale.defined() ? step.grad_scale.reshape({}).to(options) : scalar(1.0);
  std::vector<at::Tensor> lr;
  for (size_t group = 0; group < step.groups.size(); ++group) {
    const bool is_tensor = !step.lr_tensors.empty() && step.lr_tensors[group].defined();
    lr.push_back(is_tensor ? step.lr_tensors[group].reshape({}).to(options) : scalar(step.groups[group].lr));
  }

  for (int64_t i = 0; i < static_cast<int64_t>(step.tensors.size()); ++i) {
    const auto& tensor = step.tensors[i];
    const auto& h = step.groups[tensor.group];
    const auto dtype = tensor.param.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    auto weight = tensor.weight().to(dtype);
    // The norm keeps its argument for the backward pass, and the parameter is written below.
    if (c10::GradMode::is_enabled() && weight.requires_grad()) weight = weight.clone();
    const auto grad = tensor.grad.to(dtype);

    const bool given = step.squared_norms.defined();
    const auto q = trust_ratio(
        h, lr[tensor.group], given ? step.squared_norms.select(0, i).select(0, 0) : squared_norm(weight),
        given ? step.squared_norms.select(0, i).select(0, 1) : squared_norm(grad), grad_scale);
    if (step.trust_ratios.defined()) assign(step.trust_ratios.select(0, i), q.detach());

    auto damped = scalar(h.momentum > 0.0 ? 1.0 - h.dampening : 1.0);
    if (tensor.step.defined()) {
      damped = at::where(tensor.step.reshape({}) == 0, scalar(1.0), damped);
      assign(tensor.step, tensor.step + 1);
    }
    const auto factor = [dtype](const at::Tensor& value) { return value.to(dtype); };
    const Coefficients<at::Tensor> c{
        .grad_gain = factor((h.maximize ? -1.0 : 1.0) / grad_scale),
        .weight_decay = factor(scalar(h.weight_decay)),
        .trust_ratio = factor(q),
        .momentum = factor(scalar(h.momentum)),
        .buffer_gain = factor(h.classic_momentum ? lr[tensor.group] : damped),
        .nesterov_gain = factor(h.classic_momentum ? lr[tensor.group] : scalar(1.0)),
        .step_size = factor(h.classic_momentum ? scalar(1.0) : lr[tensor.group]),
        .nesterov = h.nesterov,
    };
    auto momentum_buffer =
        tensor.momentum_buffer.defined() ? tensor.momentum_buffer.to(dtype) : at::zeros_like(weight);
    update(c, grad, weight, momentum_buffer);

    if (tensor.momentum_buffer.defined()) assign(tensor.momentum_buffer, momentum_buffer);
    if (tensor.master_param.defined()) assign(tensor.master_param, weight);
    assign(tensor.param, weight);
  }
}

at::Tensor squared_norms_reference(at::TensorList params, at::TensorList grads, const at::Tensor&) {
  std::vector<at::Tensor> norms;
  norms.reserve(2 * params.size());
  for (size_t i = 0; i < params.size(); ++i) {
    norms.push_back(squared_norm(params[i]));
    norms.push_back(squared_norm(grads[i]));
  }
  return at::stack(norms).reshape({-1, 2});
}

}  // namespace fused_lars
