// The step in ATen operators. It is slow, runs on any device, and autograd can follow it.

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include "norm_range.h"
#include "rounding_reference.h"
#include "rule.h"
#include "step.h"

namespace fused_lars {
namespace {

// A sum of squares of elements that were multiplied by `scale`. An undefined scale is 1.
struct ScaledNorm {
  at::Tensor squared, scale;

  at::Tensor norm() const { return unscaled(squared.sqrt()); }
  at::Tensor norm_where(const at::Tensor& condition, const at::Tensor& otherwise) const {
    return unscaled(at::where(condition, squared, otherwise).sqrt());
  }

 private:
  at::Tensor unscaled(const at::Tensor& root) const { return scale.defined() ? root / scale : root; }
};

// norm_range.h's square_scale, with its conditions as at::where.
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

// What rule.h calls `to`: converts numbers to the dtype that elements are computed in.
struct ToDtype {
  at::TensorOptions options;  // the device and that dtype

  at::Tensor operator()(const at::Tensor& number) const { return number.to(options); }
  at::Tensor operator()(double number) const { return at::full({}, number, options); }
};

// The second norm of a parameter: see unscaled_grad_norm in rule.h.
ScaledNorm grad_norm(const Hyperparameters& h, const at::Tensor& weight, const at::Tensor& grad,
                     const at::Tensor& grad_scale) {
  if (!h.decayed_norm) return scaled_norm(grad);
  const auto dtype = norm_dtype(grad.device());
  const ToDtype to{grad_scale.options().dtype(dtype)};
  const auto decayed = decayed_gradient(h, grad_scale, at::ones_like(grad_scale), to);
  return scaled_norm(decayed(grad.to(dtype), weight.to(dtype)));
}

// rule.h's trust_ratio with its conditions as at::where, since a branch would read a value on the host. Both
// sides of at::where are computed. Where a norm is 0, or lr is, the side that is not chosen computes with 1,
// or its gradient would be NaN and autograd would spread it.
at::Tensor trust_ratio(const Hyperparameters& h, const at::Tensor& lr, const ScaledNorm& weight,
                       const ScaledNorm& grad, const at::Tensor& grad_scale) {
  const auto one = at::ones_like(weight.squared);
  auto q = one;
  if (h.layer_adaptation) {
    const auto both = (weight.squared > 0).logical_and(grad.squared > 0);
    const auto ratio =
        ratio_of_norms(h, weight.norm_where(both, one), grad.norm_where(both, one), grad_scale);
    q = at::where(both, ratio, one);
  }
  if (h.trust_clip)
    q = at::where((lr > 0).logical_and((q >= lr).logical_not()), q / at::where(lr > 0, lr, one), one);
  return q;
}

// rule.h's split_ratio. `rest` is detached: in range it is 1 and no function of q.
SplitRatio<at::Tensor> split_ratio(const at::Tensor& q, at::ScalarType dtype) {
  if (dtype != at::kFloat) return {q, at::ones_like(q)};
  const auto held = q.clamp(kLeastRatio, kMostRatio);
  return {held, (q / held).detach()};
}

// The tensor whose order in memory numbers the elements, for random bits and blocks.
const at::Tensor& numbering(const StepTensor& tensor) {
  return tensor.momentum_scale.defined() ? tensor.momentum_buffer : tensor.param;
}

at::Tensor momentum_of(const StepTensor& tensor, const at::Tensor& weight, at::ScalarType dtype) {
  if (!tensor.momentum_buffer.defined()) return at::zeros_like(weight);
  if (tensor.momentum_scale.defined()) return decode_momentum(tensor.momentum_buffer, tensor.momentum_scale);
  return tensor.momentum_buffer.to(dtype);
}

at::Tensor rounded(const StepTensor& tensor, RoundedTensor which, const at::Tensor& values,
                   at::ScalarType dtype) {
  const auto& like = numbering(tensor);
  const auto vector = in_memory_order(values.detach(), like);
  const auto random = random_bits(tensor.rng_state, which, vector.sym_numel());
  return from_memory_order(round_stochastically(vector, dtype, random), like);
}

// What the buffer becomes; with a scale if it is int8.
EncodedMomentum stored_momentum(const StepTensor& tensor, const Hyperparameters& h,
                                const at::Tensor& values) {
  const auto dtype = tensor.momentum_buffer.scalar_type();
  if (!rounds_momentum_stochastically(h, tensor.weight().scalar_type(), dtype)) return {values, {}};
  if (!tensor.momentum_scale.defined()) {
    return {rounded(tensor, RoundedTensor::momentum_buffer, values, dtype), {}};
  }
  const auto& like = numbering(tensor);
  const auto vector = in_memory_order(values.detach(), like);
  auto encoded = encode_vector(
      vector, random_bits(tensor.rng_state, RoundedTensor::momentum_buffer, vector.sym_numel()));
  return {from_memory_order(encoded.codes, like), encoded.scale};
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
    if (step.masters_follow && tensor.master_param.defined())
      take_over(tensor.param, tensor.master_param, skip);
    const auto dtype = tensor.param.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    auto weight = tensor.weight().to(dtype);
    // The backward pass of the norm needs the weight as it is now, and the parameter is written below.
    if (c10::GradMode::is_enabled() && weight.requires_grad()) weight = weight.clone();
    const auto grad = tensor.grad.to(dtype);

    const auto given = [&](int64_t column) {
      return ScaledNorm{step.squared_norms.select(0, i).select(0, column), {}};
    };
    const bool is_given = step.squared_norms.defined();
    const auto weight_norm = is_given ? given(0) : scaled_norm(weight);
    const auto its_grad_norm = is_given ? given(1) : grad_norm(h, weight, grad, grad_scale);
    if (step.layer_norms.defined()) {
      const auto unscaled = unscaled_grad_norm(h, its_grad_norm.norm(), grad_scale);
      assign(step.layer_norms.select(0, i), at::stack({weight_norm.norm(), unscaled}).detach());
    }
    const auto q = trust_ratio(h, lr[tensor.group], weight_norm, its_grad_norm, grad_scale);
    if (step.trust_ratios.defined()) assign(step.trust_ratios.select(0, i), q.detach());

    auto undamped = scalar(1.0 - h.dampening);
    if (tensor.step.defined()) {
      undamped = at::where(tensor.step.reshape({}) == 0, scalar(1.0), undamped);
      assign(tensor.step, tensor.step + 1);
    }
    const auto c = coefficients(h, lr[tensor.group], split_ratio(q, dtype), grad_scale, undamped,
                                ToDtype{options.dtype(dtype)});
    auto momentum_buffer = momentum_of(tensor, weight, dtype);
    update(c, grad, weight, momentum_buffer);

    if (tensor.momentum_buffer.defined()) {
      const auto stored = stored_momentum(tensor, h, momentum_buffer);
      assign(tensor.momentum_buffer, stored.codes);
      if (tensor.momentum_scale.defined()) assign(tensor.momentum_scale, stored.scale);
    }
    if (tensor.master_param.defined()) assign(tensor.master_param, weight);
    if (rounds_weight_stochastically(h, tensor.weight().scalar_type())) {
      weight = rounded(tensor, RoundedTensor::weight, weight, tensor.param.scalar_type());
    }
    assign(tensor.param, weight);
    if (tensor.rng_state.defined()) {
      const auto updates = tensor.rng_state.select(0, 1);
      assign(updates, updates + 1);
    }
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
