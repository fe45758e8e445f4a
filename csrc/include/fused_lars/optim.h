#pragma once

#include <torch/optim/optimizer.h>
#include <torch/serialize/archive.h>
#include <torch/types.h>

#include <memory>
#include <type_traits>
#include <unordered_map>
#include <utility>
#include <vector>

#include "fused_lars/errors.h"
#include "fused_lars/hyperparameters.h"

namespace fused_lars {

// The value of an option, and whether somebody gave it. A param group inherits what nobody gave from the
// optimizer's defaults, so weight_decay(0) in a group is 0 there whatever the defaults say.
template <typename T>
class Option {
 public:
  static Option unset(T value) {
    Option option(value);
    option.given_ = false;
    return option;
  }
  template <typename U, typename = std::enable_if_t<std::is_arithmetic_v<U>>>
  Option(U value) : value_(static_cast<T>(value)), given_(true) {}  // NOLINT(google-explicit-constructor)
  operator T() const { return value_; }                             // NOLINT(google-explicit-constructor)
  bool given() const { return given_; }

 private:
  T value_;
  bool given_;
};

// The options of an optimizer or of a param group. Meaning and ranges: fused_lars/hyperparameters.h.
struct LARSOptions : torch::optim::OptimizerCloneableOptions<LARSOptions> {
  LARSOptions() = default;
  LARSOptions(double lr);  // NOLINT(google-explicit-constructor): as torch::optim::SGDOptions

  TORCH_ARG(Option<double>, lr) = Option<double>::unset(Hyperparameters{}.lr);
  TORCH_ARG(Option<double>, momentum) = Option<double>::unset(Hyperparameters{}.momentum);
  TORCH_ARG(Option<double>, weight_decay) = Option<double>::unset(Hyperparameters{}.weight_decay);
  TORCH_ARG(Option<double>, trust_coefficient) = Option<double>::unset(Hyperparameters{}.trust_coefficient);
  TORCH_ARG(Option<double>, eps) = Option<double>::unset(Hyperparameters{}.eps);
  TORCH_ARG(Option<double>, dampening) = Option<double>::unset(Hyperparameters{}.dampening);
  TORCH_ARG(Option<bool>, nesterov) = Option<bool>::unset(Hyperparameters{}.nesterov);
  TORCH_ARG(Option<bool>, maximize) = Option<bool>::unset(Hyperparameters{}.maximize);
  TORCH_ARG(Option<bool>, trust_clip) = Option<bool>::unset(Hyperparameters{}.trust_clip);
  TORCH_ARG(Option<bool>, layer_adaptation) = Option<bool>::unset(Hyperparameters{}.layer_adaptation);
  TORCH_ARG(Option<bool>, classic_momentum) = Option<bool>::unset(Hyperparameters{}.classic_momentum);
  TORCH_ARG(Option<bool>, master_weights) = Option<bool>::unset(Hyperparameters{}.master_weights);

 public:
  Hyperparameters hyperparameters() const;
  // These options, with what was not given taken from `defaults`.
  LARSOptions inherit(const LARSOptions& defaults) const;

  double get_lr() const override { return lr_; }
  void set_lr(double lr) override { lr_ = lr; }
  void serialize(torch::serialize::InputArchive& archive) override;
  void serialize(torch::serialize::OutputArchive& archive) const override;
  friend bool operator==(const LARSOptions& left, const LARSOptions& right);

 private:
  template <typename Visit>
  static void for_each_option(Visit visit);
};

// What LARS keeps for a parameter. An undefined tensor is one that the parameter's group does not need.
struct LARSParamState : torch::optim::OptimizerCloneableParamState<LARSParamState> {
  TORCH_ARG(at::Tensor, momentum_buffer);
  TORCH_ARG(at::Tensor, master_param);  // fp32, of an fp16 or bf16 parameter
  TORCH_ARG(at::Tensor, step);          // updates applied so far; kept with dampening only

 public:
  void serialize(torch::serialize::InputArchive& archive) override;
  void serialize(torch::serialize::OutputArchive& archive) const override;
};

// LARS as an optimizer of the C++ front end; the same rule, defaults and bits as fused_lars.LARS in Python.
//
//   fused_lars::LARS optimizer(model->parameters(), fused_lars::LARSOptions(10.5).momentum(0.9));
//
// All groups are stepped by one op call for each device. Parameters without a gradient are left alone.
// Throws a fused_lars::Error before anything has changed; the optimizer and its groups are checked when
// they are made, and what was changed in their options afterwards by step().
class LARS : public torch::optim::Optimizer {
 public:
  explicit LARS(const std::vector<torch::optim::OptimizerParamGroup>& param_groups,
                LARSOptions defaults = {});
  explicit LARS(std::vector<at::Tensor> params, LARSOptions defaults = {});

  // Hides Optimizer::add_param_group, which merges the options of torch's own optimizers only. Groups
  // that are added through a reference to the base class lose their options or do not inherit.
  void add_param_group(const torch::optim::OptimizerParamGroup& param_group);

  // Runs `closure`, if there is one, with gradients enabled, then the update. Returns the closure's loss.
  at::Tensor step(LossClosure closure = nullptr) override;

  void save(torch::serialize::OutputArchive& archive) const override;
  // Takes over the state and the options of an optimizer with the same groups; state moves to the device
  // of its parameter and keeps its dtype.
  void load(torch::serialize::InputArchive& archive) override;

 private:
  void check_distinct(const std::vector<at::Tensor>& params, size_t group) const;

  std::unordered_map<at::Device, std::vector<at::Tensor>> workspaces_;
};

}  // namespace fused_lars
