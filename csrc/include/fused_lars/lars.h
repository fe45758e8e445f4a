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

// What a learning rate scheduler needs of an optimizer.
class FUSED_LARS_API LearningRate {
 public:
  virtual ~LearningRate() = default;
  virtual double learning_rate() const = 0;
  // Throws InvalidLearningRate unless lr is finite and >= 0.
  virtual void set_learning_rate(double lr) = 0;
};

// What a training loop, or an optimizer that wraps another, needs of an optimizer whose state is kept
// under parameter ids that the caller chooses.
class FUSED_LARS_API StepOptimizer {
 public:
  virtual ~StepOptimizer() = default;

  // Updates `weights` in place. `grad` has the shape and device of the weights, and their dtype or fp32.
  virtual void step(int64_t parameter_id, const at::Tensor& weights, const at::Tensor& grad) = 0;

  // Updates graph[node] with its own .grad; `graph` is the ordered list of a model's leaf tensors and
  // `node`, an index into it, is the parameter id as well. A leaf that does not require grad is left alone.
  // Throws MissingGradient for one that does and has none, InvalidNode for an index outside the list.
  virtual void step_graph_node(at::TensorList graph, int64_t node) = 0;

  // Forgets what was kept for every parameter.
  virtual void clear_state() = 0;
};

// LARS with classic momentum (You, Gitman, Ginsburg 2017, algorithm 1; the formula is in csrc/rule.h), its
// momentum buffers kept under parameter ids:
//
//   auto optimizer = fused_lars::Lars(0.1).with_momentum(0.9).with_weight_decay(5e-4);
//   optimizer.step(0, weight, weight_gradient);
//
// Parameters are dense fp32, fp64, fp16 or bf16 tensors on any device. A buffer starts at zero when its id
// is first used with momentum > 0, and again whenever the shape under that id changes. It follows its weights
// to another dtype or device with its values.
//
// A method that throws (a fused_lars::Error) has changed nothing. Distinct instances share nothing and may
// be used by different threads at once; one instance is for one thread and one CUDA stream at a time. A copy
// has buffers of its own. torch.classes.fused_lars.Lars is this class:
// IValue::toCustomClass<fused_lars::Lars>() gives the one that a TorchScript module holds.
class FUSED_LARS_API Lars final : public torch::CustomClassHolder, public LearningRate, public StepOptimizer {
 public:
  // momentum 0, weight_decay 0, trust_coefficient 0.001. Throws InvalidLearningRate unless base_lr is
  // finite and >= 0.
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

  // step() of every weights[i] with grads[i] under ids[i], as one fused step for each device. The lists are
  // equally long and no id comes twice (InvalidOption).
  void step_all(at::IntArrayRef ids, at::TensorList weights, at::TensorList grads);

  // All of an instance as values that can be stored: a format version, lr, momentum, weight decay, trust
  // coefficient and decayed_norm (0 or 1), then the ids and their buffers. from_state copies the buffers,
  // state does not.
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
