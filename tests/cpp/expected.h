#pragma once

// LARS in fp64 with one plain loop a norm and one an update, written from the paper and the documentation
// of the options: shares nothing with csrc/rule.h.

#include <gtest/gtest.h>
#include <torch/types.h>

#include <cmath>
#include <string>
#include <vector>

namespace expected {

struct Settings {
  double lr = 1, momentum = 0, weight_decay = 0, trust_coefficient = 0.001, eps = 0, dampening = 0;
  bool nesterov = false, maximize = false, trust_clip = false, layer_adaptation = true, decayed_norm = false,
       classic_momentum = true;
};

struct Parameter {
  explicit Parameter(const torch::Tensor& tensor)
      : weights(values(tensor)), velocity(weights.size()), shape(tensor.sizes().vec()) {}

  static std::vector<double> values(const torch::Tensor& tensor) {
    const auto flat = tensor.detach().to(torch::kCPU, torch::kDouble).contiguous().flatten();
    return {flat.data_ptr<double>(), flat.data_ptr<double>() + flat.numel()};
  }

  void step(const Settings& s, const torch::Tensor& gradient) {
    auto grads = values(gradient);
    double squared_weights = 0, squared_grads = 0, squared_decayed = 0;
    for (size_t i = 0; i < grads.size(); ++i) {
      if (s.maximize) grads[i] = -grads[i];
      squared_weights += weights[i] * weights[i];
      squared_grads += grads[i] * grads[i];
      squared_decayed += std::pow(grads[i] + s.weight_decay * weights[i], 2);
    }
    double ratio = 1;
    if (s.decayed_norm) {
      if (s.layer_adaptation && squared_weights != 0 && squared_decayed != 0) {
        ratio = s.trust_coefficient * std::sqrt(squared_weights) / (std::sqrt(squared_decayed) + s.eps);
      }
    } else if (s.layer_adaptation && squared_weights != 0 && squared_grads != 0) {
      const double norm = std::sqrt(squared_weights);
      ratio = s.trust_coefficient * norm / (std::sqrt(squared_grads) + s.weight_decay * norm + s.eps);
    }
    if (s.trust_clip && s.lr > 0) ratio = std::fmin(ratio / s.lr, 1);
    for (size_t i = 0; i < grads.size(); ++i) {
      const double direction = ratio * (grads[i] + s.weight_decay * weights[i]);
      if (s.classic_momentum) {
        velocity[i] = s.momentum * velocity[i] + s.lr * direction;
        weights[i] -= s.nesterov ? s.momentum * velocity[i] + s.lr * direction : velocity[i];
      } else {
        velocity[i] = applied == 0 ? direction : s.momentum * velocity[i] + (1 - s.dampening) * direction;
        weights[i] -= s.lr * (s.nesterov ? direction + s.momentum * velocity[i] : velocity[i]);
      }
    }
    ++applied;
  }

  torch::Tensor tensor() const { return torch::tensor(weights, torch::kDouble).reshape(shape); }

  std::vector<double> weights, velocity;
  std::vector<int64_t> shape;
  int applied = 0;
};

}  // namespace expected

// Weights and gradients that no two tests share; `seed` makes them.
inline torch::Tensor random_tensor(std::vector<int64_t> shape, int seed, torch::Dtype dtype = torch::kFloat) {
  auto generator = at::detail::createCPUGenerator(seed);
  return torch::randn(shape, generator, torch::kDouble).to(dtype);
}

inline bool same_bits(const torch::Tensor& a, const torch::Tensor& b) {
  return a.scalar_type() == b.scalar_type() && torch::equal(a, b);
}

// How far `tensor` may be from fp64 after a few steps.
inline double tolerance(torch::Dtype dtype) {
  switch (dtype) {
    case torch::kDouble:
      return 1e-13;
    case torch::kHalf:
      return 4e-3;
    case torch::kBFloat16:
      return 3e-2;
    default:
      return 2e-6;
  }
}

inline void expect_close(const torch::Tensor& got, const expected::Parameter& want,
                         const std::string& what = "") {
  const double bound = tolerance(got.scalar_type());
  EXPECT_TRUE(torch::allclose(got.detach().to(torch::kCPU, torch::kDouble), want.tensor(), bound, bound))
      << what;
}

#define EXPECT_CONTAINS(text, part) EXPECT_NE(std::string(text).find(part), std::string::npos) << (text)

// Runs STATEMENT, which must throw ERROR itself, not a class that derives from it or that it derives from,
// and yields the message.
#define MESSAGE_OF(statement, ERROR)                                             \
  [&]() -> std::string {                                                         \
    try {                                                                        \
      statement;                                                                 \
    } catch (const c10::Error& error) {                                          \
      EXPECT_EQ(typeid(error), typeid(ERROR)) << error.what_without_backtrace(); \
      return error.what_without_backtrace();                                     \
    }                                                                            \
    ADD_FAILURE() << #statement " did not throw";                                \
    return "";                                                                   \
  }()
