#pragma once

// The LARS update rule: the only place where its arithmetic is written. Host and device code include
// this header; the fused CPU step and the CUDA kernel call these functions and add none of their own.
//
//   g' = (maximize ? -g : g) / grad_scale
//   q  = trust_coefficient * |w| / (|g'| + weight_decay * |w| + eps)     (1 where a norm is 0)
//        or, with decayed_norm:  trust_coefficient * |w| / (|g' + weight_decay * w| + eps)
//   u  = q * (g' + weight_decay * w)
//   classic momentum:  v = momentum * v + lr * u               w -= nesterov ? momentum * v + lr * u : v
//   torch momentum:    v = momentum * v + (1 - dampening) * u  w -= lr * (nesterov ? u + momentum * v : v)
//
// You, Gitman, Ginsburg 2017, "Large Batch Training of Convolutional Networks", equations 6 and 7 and
// algorithm 1. Translation units that include this header are compiled without contraction of a * b + c
// to one rounding, so every backend and vector width gives the same bits from the same norms.

#include <cmath>

#include "fused_lars/hyperparameters.h"

#ifdef __CUDACC__
#define FUSED_LARS_INLINE __host__ __device__ __forceinline__
#else
#define FUSED_LARS_INLINE inline __attribute__((always_inline))
#endif

namespace fused_lars {

// g' + weight_decay * w, from a gradient as stored and its weight. The update multiplies it by the trust
// ratio, and decayed_norm takes its norm: of this sum, as rounded, and not from the norms of its terms, which
// would leave no digits where the terms nearly cancel.
template <typename T>
struct DecayedGradient {
  T grad_gain;
  T weight_decay;

  template <typename V>
  FUSED_LARS_INLINE V operator()(const V& grad, const V& weight) const {
    return grad_gain * grad + weight_decay * weight;
  }
};

template <typename T>
FUSED_LARS_INLINE DecayedGradient<T> decayed_gradient(const Hyperparameters& h, double grad_scale,
                                                      double factor = 1.0) {
  return {static_cast<T>((h.maximize ? -1.0 : 1.0) / grad_scale * factor),
          static_cast<T>(h.weight_decay * factor)};
}

// The second norm that a step takes of a parameter, beside |w|: |g| of the gradient as stored or, with
// decayed_norm, |g' + weight_decay * w|. This is what it is without grad_scale.
FUSED_LARS_INLINE double unscaled_grad_norm(const Hyperparameters& h, double grad_norm, double grad_scale) {
  return h.decayed_norm ? grad_norm : grad_norm / fabs(grad_scale);
}

// The trust ratio q of one parameter (paper, equation 6) from the two norms that the step takes of the whole
// parameter. A NaN norm counts as 0 does: q is 1 and the NaN reaches the weights through the gradient itself.
FUSED_LARS_INLINE double trust_ratio(const Hyperparameters& h, double lr, double weight_norm,
                                     double grad_norm, double grad_scale) {
  double q = 1.0;
  if (h.layer_adaptation && weight_norm > 0.0 && grad_norm > 0.0) {
    const double unscaled = unscaled_grad_norm(h, grad_norm, grad_scale);
    const double divisor = h.decayed_norm ? unscaled : unscaled + h.weight_decay * weight_norm;
    q = h.trust_coefficient * weight_norm / (divisor + h.eps);
  }
  // LARC: the layer's rate q never exceeds lr. At lr == 0 nothing moves and there is nothing to clip.
  if (h.trust_clip) q = lr > 0.0 && !(q >= lr) ? q / lr : 1.0;
  return q;
}

// The rule for one parameter reduced to factors. Both momentum conventions and the absence of momentum
// are one formula, so that an element costs one branch at most:
//   u = trust_ratio * decayed_gradient(g, w)
//   v = momentum * v + buffer_gain * u
//   w -= step_size * (nesterov ? momentum * v + nesterov_gain * u : v)
// Multiplying by a factor of exactly 1 or 0 leaves the bits that the convention's own formula gives.
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

// The part of a trust ratio that float holds as a normal number, with room beside it. What is left, a factor
// of 1 but for layers whose gradient is some 2^120 times smaller or larger than their weights, goes to the
// sum that the ratio multiplies.
constexpr double kLeastRatio = 0x1p-120, kMostRatio = 0x1p120;
FUSED_LARS_INLINE double held_by_float(double q) {
  return q < kLeastRatio ? kLeastRatio : q > kMostRatio ? kMostRatio : q;
}

// first_step: no update has been applied to this parameter yet, and torch's convention leaves the first
// one undamped.
template <typename T>
FUSED_LARS_INLINE Coefficients<T> coefficients(const Hyperparameters& h, double lr, double q,
                                               double grad_scale, bool first_step) {
  const double damped = first_step ? 1.0 : 1.0 - h.dampening;
  const double held = sizeof(T) == sizeof(float) ? held_by_float(q) : q;
  const double rest = held == q ? 1.0 : q / held;
  Coefficients<T> c;
  c.decayed_gradient = decayed_gradient<T>(h, grad_scale, rest);
  c.trust_ratio = static_cast<T>(held);
  c.momentum = static_cast<T>(h.momentum);
  c.buffer_gain = static_cast<T>(h.classic_momentum ? lr : (h.momentum > 0.0 ? damped : 1.0));
  c.nesterov_gain = static_cast<T>(h.classic_momentum ? lr : 1.0);
  c.step_size = static_cast<T>(h.classic_momentum ? 1.0 : lr);
  c.nesterov = h.nesterov;
  return c;
}

// One element, or one vector of elements. Without momentum the caller passes a buffer of 0 and drops it.
template <typename T, typename V>
FUSED_LARS_INLINE void update(const Coefficients<T>& c, V grad, V& weight, V& momentum_buffer) {
  const V u = c.trust_ratio * c.decayed_gradient(grad, weight);
  const V v = c.momentum * momentum_buffer + c.buffer_gain * u;
  const V direction = c.nesterov ? c.momentum * v + c.nesterov_gain * u : v;
  momentum_buffer = v;
  weight = weight - c.step_size * direction;
}

}  // namespace fused_lars
