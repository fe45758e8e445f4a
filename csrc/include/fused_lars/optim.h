#pragma once

#include <torch/optim/optimizer.h>
#include <torch/serialize/archive.h>
#include <torch/types.h>

#include <memory>
#include <optional>
#include <set>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "fused_lars/errors.h"
#include "fused_lars/export.h"
#include "fused_lars/hyperparameters.h"
#include "fused_lars/workspaces.h"

namespace fused_lars {

// When the trust ratio is used: true, false, or "decayed": where the group's weight_decay is greater than 0,
// as timm and lightly have it, whose groups of bias and norms are told by weight_decay 0 alone.
class FUSED_LARS_API LayerAdaptation {
 public:
  template <typename T, typename = std::enable_if_t<std::is_arithmetic_v<T>>>
  LayerAdaptation(T on) : kind_(on ? kOn : kOff) {}  // NOLINT(google-explicit-constructor)
  // Throws InvalidOption for any text but "decayed".
  LayerAdaptation(const char* text);  // NOLINT(google-explicit-constructor)

  // Whether parameters with this weight decay are adapted.
  bool at(double weight_decay) const { return kind_ == kDecayed ? weight_decay > 0.0 : kind_ == kOn; }

  // A bool or the text, as they are stored.
  torch::IValue to_ivalue() const;
  static LayerAdaptation from_ivalue(const torch::IValue& value);

  bool operator==(const LayerAdaptation&) const = default;

 private:
  enum Kind : uint8_t { kOff, kOn, kDecayed } kind_;
};

// The accessors of TORCH_ARG for `field`; the setter remembers that the option was given.
#define FUSED_LARS_OPTION(T, name, field)          \
  LARSOptions& name(const T& value) {              \
    field = value;                                 \
    given_.insert(#name);                          \
    return *this;                                  \
  }                                                \
  const T& name() const noexcept { return field; } \
  T& name() noexcept { return field; }             \
  static_assert(true)

// The options of an optimizer or of a param group. Meaning and ranges: fused_lars/hyperparameters.h. Used as
// torch::optim::SGDOptions is: options.lr(0.1).momentum(0.9), and options.lr() is a double&.
//
// A param group inherits from the optimizer's defaults what it was not given. Given is what a setter was
// called for, whatever the value, so weight_decay(0) in a group is 0 there. What is assigned through a
// reference (options.eps() = 1e-8) counts as given unless it is the default value.
struct FUSED_LARS_API LARSOptions : torch::optim::OptimizerCloneableOptions<LARSOptions> {
  LARSOptions() = default;
  LARSOptions(double lr);  // NOLINT(google-explicit-constructor): as torch::optim::SGDOptions

  FUSED_LARS_OPTION(double, lr, values_.lr);
  FUSED_LARS_OPTION(double, momentum, values_.momentum);
  FUSED_LARS_OPTION(double, weight_decay, values_.weight_decay);
  FUSED_LARS_OPTION(double, trust_coefficient, values_.trust_coefficient);
  FUSED_LARS_OPTION(double, eps, values_.eps);
  FUSED_LARS_OPTION(double, dampening, values_.dampening);
  FUSED_LARS_OPTION(bool, nesterov, values_.nesterov);
  FUSED_LARS_OPTION(bool, maximize, values_.maximize);
  FUSED_LARS_OPTION(bool, trust_clip, values_.trust_clip);
  FUSED_LARS_OPTION(LayerAdaptation, layer_adaptation, layer_adaptation_);
  FUSED_LARS_OPTION(bool, decayed_norm, values_.decayed_norm);
  FUSED_LARS_OPTION(bool, classic_momentum, values_.classic_momentum);
  FUSED_LARS_OPTION(bool, master_weights, values_.master_weights);

  Hyperparameters hyperparameters() const;
  // These options, with what was not given taken from `defaults`.
  LARSOptions inherit(const LARSOptions& defaults) const;

  double get_lr() const override { return lr(); }
  void set_lr(double value) override { lr(value); }
  void serialize(torch::serialize::InputArchive& archive) override;
  void serialize(torch::serialize::OutputArchive& archive) const override;
  FUSED_LARS_API friend bool operator==(const LARSOptions& left, const LARSOptions& right);

 private:
  Hyperparameters values_;  // but for layer_adaptation
  LayerAdaptation layer_adaptation_ = true;
  std::set<std::string> given_;
};

#undef FUSED_LARS_OPTION

// What LARS keeps for a parameter. An undefined tensor is one that the parameter's group does not need.
struct FUSED_LARS_API LARSParamState : torch::optim::OptimizerCloneableParamState<LARSParamState> {
  TORCH_ARG(at::Tensor, momentum_buffer);
  TORCH_ARG(at::Tensor, master_param);  // fp32, of an fp16 or bf16 parameter
  TORCH_ARG(at::Tensor, step);          // updates applied so far; kept with dampening only

 public:
  // The parameter's version and address after the last step, which a write changes; not stored.
  std::optional<std::pair<uint32_t, const void*>> mark;

  void serialize(torch::serialize::InputArchive& archive) override;
  void serialize(torch::serialize::OutputArchive& archive) const override;
};

// LARS as an optimizer of the C++ front end; the same rule, defaults and bits as fused_lars.LARS in Python.
//
//   fused_lars::LARS optimizer(model->parameters(), fused_lars::LARSOptions(10.5).momentum(0.9));
//
// All groups are stepped by one op call for each device. Parameters without a gradient are left alone. What
// is written into a parameter with a master between steps stays, and costs its other elements nothing. Throws
// a fused_lars::Error before anything has changed; the optimizer and its groups are checked when they are
// made, and what was changed in their options afterwards by step().
class FUSED_LARS_API LARS : public torch::optim::Optimizer {
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
  // Takes over the state and the options of an optimizer with the same groups. State moves to the device and
  // the dtype of its parameter; fp32 state of an fp16 or bf16 parameter stays fp32. Throws an Error, and
  // changes nothing, where state does not fit its parameter.
  void load(torch::serialize::InputArchive& archive) override;

 private:
  void check_distinct(const std::vector<at::Tensor>& params, size_t group) const;

  Workspaces workspaces_;
};

}  // namespace fused_lars
