#pragma once

// The LARS update rule: the only place that has its arithmetic. The CPU step and the CUDA kernel call these
// functions with numbers, on the host and on the device. The reference (reference.cpp) calls the templates
// among them with tensors. It writes only the conditions in its own form, because a tensor cannot choose a
// branch.
//
//   g' = (maximize ? -g : g) / grad_scale
//   q  = trust_coefficient * |w| / (|g'| + weight_decay * |w| + eps)     (1 where a norm is 0)
//        or, with decayed_norm:  trust_coefficient * |w| / (|g' + weight_decay * w| + eps)
//   u  = q * (g' + weight_decay * w)
//   classic momentum:  v = momentum * v + lr * u               w -= nesterov ? momentum * v + lr * u : v
//   torch momentum:    v = momentum * v + (1 - dampening) * u  w -= lr * (nesterov ? u + momentum * v : v)
//
// You, Gitman, Ginsburg 2017, "Large Batch Training of Convolutional Networks", equations 6 and 7 and
// algorithm 1. All files that include this header are compiled without contraction, which would round
// a * b + c once instead of twice. So every backend and vector width gives the same bits from the same norms.

#include <cmath>

#include "fused_lars/hyperparameters.h"

#ifdef __CUDACC__
#define FUSED_LARS_INLINE __host__ __device__ __forceinline__
#else
#define FUSED_LARS_INLINE inline __attribute__((always_inline))
#endif

namespace fused_lars {

// g' + weight_decay * w, from a gradient as stored and its weight. The update multiplies this sum by the
// trust ratio. With decayed_norm its norm is taken too, of the sum as rounded. The norms of the two terms
// would not do: where the terms nearly cancel, no digit would be left.
template <typename T>
struct DecayedGradient {
  T grad_gain;
  T weight_decay;

  template <typename V>
  FUSED_LARS_INLINE V operator()(const V& grad, const V& weight) const {
    return grad_gain * grad + weight_decay * weight;
  }
};

// Converts a number to T, the type that elements are computed in.
template <typename T>
struct NumberTo {
  FUSED_LARS_INLINE T operator()(double x) const { return static_cast<T>(x); }
};

// In this function and those below, Number is double or, in the reference, at::Tensor. `to` converts a double
// or a Number to the type that elements are computed in. `factor` multiplies the whole sum.
template <typename Number, typename To>
FUSED_LARS_INLINE auto decayed_gradient(const Hyperparameters& h, const Number& grad_scale,
                                        const Number& factor, const To& to) {
  return DecayedGradient<decltype(to(factor))>{to((h.maximize ? -1.0 : 1.0) / grad_scale * factor),
                                               to(h.weight_decay * factor)};
}

template <typename T>
FUSED_LARS_INLINE DecayedGradient<T> decayed_gradient(const Hyperparameters& h, double grad_scale) {
  return decayed_gradient(h, grad_scale, 1.0, NumberTo<T>());
}

// A step takes a second norm of each parameter, beside |w|. It is |g|, of the gradient as stored, or with
// decayed_norm |g' + weight_decay * w|. This function returns what the norm is without grad_scale.
template <typename Number>
FUSED_LARS_INLINE Number unscaled_grad_norm(const Hyperparameters& h, const Number& grad_norm,
                                            const Number& grad_scale) {
  using std::abs;  // at::abs for tensors
  if (h.decayed_norm) return grad_norm;
  return grad_norm / abs(grad_scale);
}

// Equation 6 of the paper, for norms that are not 0.
template <typename Number>
FUSED_LARS_INLINE Number ratio_of_norms(const Hyperparameters& h, const Number& weight_norm,
                                        const Number& grad_norm, const Number& grad_scale) {
  Number divisor = unscaled_grad_norm(h, grad_norm, grad_scale);
  if (!h.decayed_norm) divisor = divisor + h.weight_decay * weight_norm;
  return h.trust_coefficient * weight_norm / (divisor + h.eps);
}

// The trust ratio q of one parameter, from the two norms that the step takes of the whole parameter. A norm
// that is NaN is treated as 0: q is then 1, and the NaN reaches the weights through the gradient itself.
FUSED_LARS_INLINE double trust_ratio(const Hyperparameters& h, double lr, double weight_norm,
                                     double grad_norm, double grad_scale) {
  double q = 1.0;
  if (h.layer_adaptation && weight_norm > 0.0 && grad_norm > 0.0) {
    q = ratio_of_norms(h, weight_norm, grad_norm, grad_scale);
  }
  // LARC: the layer's rate q never exceeds lr. At lr == 0 nothing moves and there is nothing to clip.
  if (h.trust_clip) q = lr > 0.0 && !(q >= lr) ? q / lr : 1.0;
  return q;
}

// The factors that the rule comes down to for one parameter. One formula serves both momentum conventions,
// and no momentum, so an element costs one branch at most:
//   u = trust_ratio * decayed_gradient(g, w)
//   v = momentum * v + buffer_gain * u
//   w -= step_size * (nesterov ? momentum * v + nesterov_gain * u : v)
// Multiplying by exactly 1 or 0 is exact, so the bits are those of the convention's own formula.
template <typename T>
struct Coefficients {
  DecayedGradient<T> decayed_gradient;
  T trust_ratio;
  T momentum;
  T buffer_gain;
  T nesterov_gain;
  T step_size;
  bool nesterov;
};

// A trust ratio in two factors, q = held * rest. Float holds `held` as a normal number, with room to spare.
// `rest` multiplies the sum that `held` is to multiply. It is 1, except for layers whose gradient is about
// 2^120 times smaller or larger than their weights.
template <typename Number>
struct SplitRatio {
  Number held;
  Number rest;
};

constexpr double kLeastRatio = 0x1p-120, kMostRatio = 0x1p120;

// T is the type that elements are computed in; double holds every ratio.
template <typename T>
FUSED_LARS_INLINE SplitRatio<double> split_ratio(double q) {
  if (sizeof(T) != sizeof(float)) return {q, 1.0};
  const double held = q < kLeastRatio ? kLeastRatio : q > kMostRatio ? kMostRatio : q;
  return {held, held == q ? 1.0 : q / held};
}

// `undamped` is the share of u that torch's convention adds to the buffer: 1 - dampening, but 1 in the first
// update of a parameter.
template <typename Number, typename To>
FUSED_LARS_INLINE auto coefficients(const Hyperparameters& h, const Number& lr, const SplitRatio<Number>& q,
                                    const Number& grad_scale, const Number& undamped, const To& to) {
  Coefficients<decltype(to(lr))> c;
  c.decayed_gradient = decayed_gradient(h, grad_scale, q.rest, to);
  c.trust_ratio = to(q.held);
  c.momentum = to(h.momentum);
  c.buffer_gain = h.classic_momentum ? to(lr) : h.momentum > 0.0 ? to(undamped) : to(1.0);
  c.nesterov_gain = h.classic_momentum ? to(lr) : to(1.0);
  c.step_size = h.classic_momentum ? to(1.0) : to(lr);
  c.nesterov = h.nesterov;
  return c;
}

// first_step: no update has been applied to this parameter yet.
template <typename T>
FUSED_LARS_INLINE Coefficients<T> coefficients(const Hyperparameters& h, double lr, double q,
                                               double grad_scale, bool first_step) {
  const double undamped = first_step ? 1.0 : 1.0 - h.dampening;
  return coefficients(h, lr, split_ratio<T>(q), grad_scale, undamped, NumberTo<T>());
}

// Updates one element, a vector of elements or, in the reference, a tensor. Without momentum the caller
// passes a buffer of 0 and drops it afterwards.
template <typename T, typename V>
FUSED_LARS_INLINE void update(const Coefficients<T>& c, V grad, V& weight, V& momentum_buffer) {
  const V u = c.trust_ratio * c.decayed_gradient(grad, weight);
  const V v = c.momentum * momentum_buffer + c.buffer_gain * u;
  const V direction = c.nesterov ? c.momentum * v + c.nesterov_gain * u : v;
  momentum_buffer = v;
  weight = weight - c.step_size * direction;
}

}  // namespace fused_lars
