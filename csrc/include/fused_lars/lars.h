#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>

#include <iosfwd>
#include <map>
#include <tuple>
#include <vector>

#include "fused_lars/errors.h"
#include "fused_lars/export.h"
#include "fused_lars/hyperparameters.h"
#include "fused_lars/workspaces.h"

namespace fused_lars {

// The part of an optimizer that a learning rate scheduler uses.
class FUSED_LARS_API LearningRate {
 public:
  virtual ~LearningRate() = default;
  virtual double learning_rate() const = 0;
  // Throws InvalidLearningRate unless lr is finite and >= 0.
  virtual void set_learning_rate(double lr) = 0;
};

// The part of an optimizer that a training loop, or an optimizer that wraps another one, uses. The optimizer
// keeps its state under parameter ids that the caller chooses.
class FUSED_LARS_API StepOptimizer {
 public:
  virtual ~StepOptimizer() = default;

  // Updates `weights` in place. `grad` has the shape and device of the weights, and their dtype or fp32.
  virtual void step(int64_t parameter_id, const at::Tensor& weights, const at::Tensor& grad) = 0;

  // Updates graph[node] with its own .grad. `graph` is the ordered list of a model's leaf tensors. `node` is
  // an index into it, and the parameter id too. A leaf that does not require grad is left alone. Throws
  // MissingGradient if the leaf requires grad and has no gradient, and InvalidNode if the index is outside of
  // the list.
  virtual void step_graph_node(at::TensorList graph, int64_t node) = 0;

  // Drops the state of all parameters.
  virtual void clear_state() = 0;
};

// LARS with classic momentum (You, Gitman, Ginsburg 2017, algorithm 1; the formula is in csrc/rule.h). It
// keeps its momentum buffers under parameter ids:
//
//   auto optimizer = fused_lars::Lars(0.1).with_momentum(0.9).with_weight_decay(5e-4);
//   optimizer.step(0, weight, weight_gradient);
//
// Parameters are strided fp32, fp64, fp16 or bf16 tensors on any device. A buffer is zero when its id is
// first used with momentum > 0, and again when the shape under that id changes. When the weights change their
// dtype or device, the buffer is converted and keeps its values.
//
// A method that throws a fused_lars::Error has changed nothing. Different instances share nothing, so threads
// may use them at the same time. One instance is for one thread and one CUDA stream at a time. A copy has its
// own buffers.
//
// torch.classes.fused_lars.Lars is this class. IValue::toCustomClass<fused_lars::Lars>() returns the instance
// that a TorchScript module holds.
class FUSED_LARS_API Lars final : public torch::CustomClassHolder, public LearningRate, public StepOptimizer {
 public:
  // Starts with momentum 0, weight_decay 0 and trust_coefficient 0.001. Throws InvalidLearningRate unless
  // base_lr is finite and >= 0.
  explicit Lars(double base_lr);
  Lars(const Lars& other);
  Lars(Lars&&) = default;
  Lars& operator=(const Lars& other);
  Lars& operator=(Lars&&) = default;

  Lars& with_momentum(double momentum);                    // InvalidMomentum unless in [0, 1)
  Lars& with_weight_decay(double weight_decay);            // InvalidWeightDecay unless finite and >= 0
  Lars& with_trust_coefficient(double trust_coefficient);  // InvalidTrustCoefficient unless finite and > 0
  Lars& with_decayed_norm(bool decayed_norm);              // false unless called: see csrc/rule.h

  double learning_rate() const override { return hyperparameters_.lr; }
  void set_learning_rate(double lr) override;
  void clear_state() override { momentum_buffers_.clear(); }

  void step(int64_t parameter_id, const at::Tensor& weights, const at::Tensor& grad) override;
  void step_graph_node(at::TensorList graph, int64_t node) override;

  // Does step(ids[i], weights[i], grads[i]) for all i, as one fused step for each device. Throws
  // InvalidOption unless the lists have one length and the ids are distinct.
  void step_all(at::IntArrayRef ids, at::TensorList weights, at::TensorList grads);

  // An instance as values that can be stored: a format version; lr, momentum, weight_decay, trust_coefficient
  // and decayed_norm (0 or 1); the ids; their buffers. from_state copies the buffers, state does not.
  using State = std::tuple<int64_t, std::vector<double>, std::vector<int64_t>, std::vector<at::Tensor>>;
  State state() const;
  static Lars from_state(const State& state);

  FUSED_LARS_API friend std::ostream& operator<<(std::ostream& out, const Lars& lars);

 private:
  void set(double Hyperparameters::* field, double value);

  Hyperparameters hyperparameters_;
  std::map<int64_t, at::Tensor> momentum_buffers_;
  Workspaces workspaces_;
};

}  // namespace fused_lars
