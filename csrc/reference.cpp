// The step in ATen operators: slow, for any device, and followed by autograd.

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include "norm_range.h"
#include "rule.h"
#include "step.h"

namespace fused_lars {
namespace {

// A sum of squares of elements that were multiplied by `scale`; undefined stands for 1.
struct ScaledNorm {
  at::Tensor squared, scale;

  at::Tensor norm() const { return unscaled(squared.sqrt()); }
  at::Tensor norm_where(const at::Tensor& condition, const at::Tensor& otherwise) const {
    return unscaled(at::where(condition, squared, otherwise).sqrt());
  }

 private:
  at::Tensor unscaled(const at::Tensor& root) const { return scale.defined() ? root / scale : root; }
};

// norm_range.h's square_scale on tensors.
template <typename T>
at::Tensor square_scale(const at::Tensor& sum, const c10::SymInt& count) {
  using Range = SquareRange<T>;
  const at::Scalar least = static_cast<c10::SymFloat>(count) * c10::SymFloat(Range::kLeast);
  const auto scalar = [&](double value) { return at::full({}, value, sum.options()); };
  const auto fits = (sum >= least).logical_and(sum < scalar(Range::kBeyond));
  return at::where(fits, scalar(1.0),
                   at::where(sum < 1.0, scalar(Range::kScale), scalar(1.0 / Range::kScale)));
}

ScaledNorm scaled_norm(const at::Tensor& tensor) {
  const auto dtype = norm_dtype(tensor.device());
  const auto x = tensor.to(dtype);
  const auto of_type = [&](at::ScalarType type) { return tensor.scalar_type() == type; };
  const bool squares_fit = dtype == at::kDouble ? !of_type(at::kDouble) : of_type(at::kHalf);
  if (squares_fit) return {x.square().sum(), {}};
  const auto sum = x.detach().square().sum();
  const auto count = x.sym_numel();
  const auto scale =
      dtype == at::kDouble ? square_scale<double>(sum, count) : square_scale<float>(sum, count);
  return {(x * scale).square().sum(), scale};
}

// rule.h's decayed_gradient on tensors of one dtype.
DecayedGradient<at::Tensor> decayed_gradient(const Hyperparameters& h, const at::Tensor& grad_scale,
                                             const at::Tensor& factor, at::ScalarType dtype) {
  return {((h.maximize ? -1.0 : 1.0) / grad_scale * factor).to(dtype), (h.weight_decay * factor).to(dtype)};
}

// The norm of a gradient that the rule takes, of a gradient as stored.
ScaledNorm grad_norm(const Hyperparameters& h, const at::Tensor& weight, const at::Tensor& grad,
                     const at::Tensor& grad_scale) {
  if (!h.decayed_norm) return scaled_norm(grad);
  const auto dtype = norm_dtype(grad.device());
  const auto decayed = decayed_gradient(h, grad_scale, at::ones_like(grad_scale), dtype);
  return scaled_norm(decayed(grad.to(dtype), weight.to(dtype)));
}

// rule.h's trust_ratio on tensors, without reading a value on the host. Where a norm is 0 the quotient is
// taken of 1, so that no NaN enters the gradient of the branch that was not chosen.
at::Tensor trust_ratio(const Hyperparameters& h, const at::Tensor& lr, const ScaledNorm& weight,
                       const ScaledNorm& grad, const at::Tensor& grad_scale) {
  const auto one = at::ones_like(weight.squared);
  auto q = one;
  if (h.layer_adaptation) {
    const auto both = (weight.squared > 0).logical_and(grad.squared > 0);
    const auto weight_norm = weight.norm_where(both, one);
    const auto grad_norm = grad.norm_where(both, one);
    const auto divisor =
        h.decayed_norm ? grad_norm : grad_norm / grad_scale.abs() + h.weight_decay * weight_norm;
    q = at::where(both, h.trust_coefficient * weight_norm / (divisor + h.eps), one);
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

    const auto given = [&](int64_t column) {
      return ScaledNorm{step.squared_norms.select(0, i).select(0, column), {}};
    };
    const bool is_given = step.squared_norms.defined();
    const auto weight_norm = is_given ? given(0) : scaled_norm(weight);
    const auto its_grad_norm = is_given ? given(1) : grad_norm(h, weight, grad, grad_scale);
    if (step.layer_norms.defined()) {
      const auto unscaled = its_grad_norm.norm() / (h.decayed_norm ? scalar(1.0) : grad_scale.abs());
      assign(step.layer_norms.select(0, i), at::stack({weight_norm.norm(), unscaled}).detach());
    }
    const auto q = trust_ratio(h, lr[tensor.group], weight_norm, its_grad_norm, grad_scale);
    const bool in_float = dtype == at::kFloat;
    const auto held = in_float ? q.clamp(kLeastRatio, kMostRatio) : q;
    const auto rest = in_float ? (q / held).detach() : scalar(1.0);  // 1, and no function of q, in range
    if (step.trust_ratios.defined()) assign(step.trust_ratios.select(0, i), q.detach());

    auto damped = scalar(h.momentum > 0.0 ? 1.0 - h.dampening : 1.0);
    if (tensor.step.defined()) {
      damped = at::where(tensor.step.reshape({}) == 0, scalar(1.0), damped);
      assign(tensor.step, tensor.step + 1);
    }
    const auto factor = [dtype](const at::Tensor& value) { return value.to(dtype); };
    const Coefficients<at::Tensor> c{
        .decayed_gradient = decayed_gradient(h, grad_scale, rest, dtype),
        .trust_ratio = factor(held),
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

at::Tensor squared_norms_reference(const NormCall& call) {
  const auto options = call.params[0].options().dtype(norm_dtype(call.params[0].device()));
  const auto grad_scale =
      call.grad_scale.defined() ? call.grad_scale.reshape({}).to(options) : at::ones({}, options);
  std::vector<at::Tensor> norms;
  norms.reserve(2 * call.params.size());
  for (size_t i = 0; i < call.params.size(); ++i) {
    const auto &weight = call.params[i], &grad = call.grads[i];
    for (const auto& norm :
         {scaled_norm(weight), grad_norm(call.groups[call.group_of[i]], weight, grad, grad_scale)}) {
      norms.push_back(norm.scale.defined() ? norm.squared / norm.scale / norm.scale : norm.squared);
    }
  }
  return at::stack(norms).reshape({-1, 2});
}

}  // namespace fused_lars
