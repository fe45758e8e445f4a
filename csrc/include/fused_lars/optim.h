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

// Whether a group's parameters get a trust ratio: true, false, or "decayed", which means true if the group's
// weight_decay is greater than 0. timm and lightly do that, since weight_decay 0 is all that marks their
// groups of biases and norm layers.
class FUSED_LARS_API LayerAdaptation {
 public:
  template <typename T, typename = std::enable_if_t<std::is_arithmetic_v<T>>>
  LayerAdaptation(T on) : kind_(on ? kOn : kOff) {}  // NOLINT(google-explicit-constructor)
  // Throws InvalidOption for any text but "decayed".
  LayerAdaptation(const char* text);  // NOLINT(google-explicit-constructor)

  // Whether parameters with this weight decay get a trust ratio.
  bool at(double weight_decay) const { return kind_ == kDecayed ? weight_decay > 0.0 : kind_ == kOn; }

  // The form in which it is stored: a bool or the text.
  torch::IValue to_ivalue() const;
  static LayerAdaptation from_ivalue(const torch::IValue& value);

  bool operator==(const LayerAdaptation&) const = default;

 private:
  enum Kind : uint8_t { kOff, kOn, kDecayed } kind_;
};

// The accessors of TORCH_ARG for `field`. The setter also records that the option was given.
#define FUSED_LARS_OPTION(T, name, field)          \
  LARSOptions& name(const T& value) {              \
    field = value;                                 \
    given_.insert(#name);                          \
    return *this;                                  \
  }                                                \
  const T& name() const noexcept { return field; } \
  T& name() noexcept { return field; }             \
  static_assert(true)

// The options of an optimizer or of a param group. fused_lars/hyperparameters.h has their meanings and
// ranges. They are used like torch::optim::SGDOptions: options.lr(0.1).momentum(0.9), and options.lr() is a
// double&.
//
// A param group takes the options that it was not given from the optimizer's defaults. An option is given
// once its setter was called, whatever the value: weight_decay(0) in a group is 0 there. An option that was
// assigned through a reference (options.eps() = 1e-8) counts as given if it differs from the default value.
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
  FUSED_LARS_OPTION(bool, stochastic_rounding, values_.stochastic_rounding);
  // The dtype in which momentum is kept: kFloat, kBFloat16 or kHalf; kChar for 8-bit codes with an fp32 scale
  // for each 128; or empty for the parameter's, or fp32 with a master. fp64 parameters take kFloat and empty.
  FUSED_LARS_OPTION(std::optional<at::ScalarType>, momentum_dtype, momentum_dtype_);
  // Seeds the random bits of stochastic rounding, from 0 to 2^31 - 1. Processes that keep copies of the same
  // parameters need the same seed.
  FUSED_LARS_OPTION(int64_t, rounding_seed, rounding_seed_);

  Hyperparameters hyperparameters() const;
  // Returns these options, with those that were not given taken from `defaults`.
  LARSOptions inherit(const LARSOptions& defaults) const;

  double get_lr() const override { return lr(); }
  void set_lr(double value) override { lr(value); }
  void serialize(torch::serialize::InputArchive& archive) override;
  void serialize(torch::serialize::OutputArchive& archive) const override;
  FUSED_LARS_API friend bool operator==(const LARSOptions& left, const LARSOptions& right);

 private:
  Hyperparameters values_;  // its layer_adaptation is not used
  LayerAdaptation layer_adaptation_ = true;
  std::optional<at::ScalarType> momentum_dtype_;
  int64_t rounding_seed_ = 0;
  std::set<std::string> given_;
};

#undef FUSED_LARS_OPTION

// What LARS keeps for a parameter. A tensor that the parameter's group does not need is undefined.
struct FUSED_LARS_API LARSParamState : torch::optim::OptimizerCloneableParamState<LARSParamState> {
  TORCH_ARG(at::Tensor, momentum_buffer);
  TORCH_ARG(at::Tensor, master_param);    // fp32; for fp16 and bf16 parameters
  TORCH_ARG(at::Tensor, step);            // the updates applied so far; with dampening
  TORCH_ARG(at::Tensor, momentum_scale);  // fp32, one for each 128 elements of an int8 buffer
  TORCH_ARG(at::Tensor, rng_state);       // int64 (3); where something is rounded stochastically

 public:
  // The parameter's version and address after the last step. A write changes one of them. It is not saved.
  std::optional<std::pair<uint32_t, const void*>> mark;

  void serialize(torch::serialize::InputArchive& archive) override;
  void serialize(torch::serialize::OutputArchive& archive) const override;
};

// LARS as an optimizer of the C++ front end; the same rule, defaults and bits as fused_lars.LARS in Python.
//
//   fused_lars::LARS optimizer(model->parameters(), fused_lars::LARSOptions(10.5).momentum(0.9));
//
// A step makes one op call for each device, for all groups. It leaves parameters without a gradient alone. If
// elements of a parameter with a master are written between two steps, the master takes those elements over
// and keeps its others.
//
// Options are checked when the optimizer or a group is made, and again by each step, since they may change in
// between. If a method throws a fused_lars::Error, nothing has changed.
class FUSED_LARS_API LARS : public torch::optim::Optimizer {
 public:
  explicit LARS(const std::vector<torch::optim::OptimizerParamGroup>& param_groups,
                LARSOptions defaults = {});
  explicit LARS(std::vector<at::Tensor> params, LARSOptions defaults = {});

  // Hides Optimizer::add_param_group, which can merge the options of torch's own optimizers only. A group
  // that is added through a reference to the base class loses its options or does not inherit any.
  void add_param_group(const torch::optim::OptimizerParamGroup& param_group);

  // Runs `closure`, if given, with gradients enabled, and then updates the parameters. Returns the closure's
  // loss.
  at::Tensor step(LossClosure closure = nullptr) override;

  void save(torch::serialize::OutputArchive& archive) const override;
  // Loads the state and the options of an optimizer with the same groups. State is moved to the device and
  // converted to the dtype that the loaded options ask for, but fp32 state of an fp16 or bf16 parameter stays
  // fp32 if they ask for none. Throws an Error, and changes nothing, if state does not fit its parameter.
  void load(torch::serialize::InputArchive& archive) override;

 private:
  void check_distinct(const std::vector<at::Tensor>& params, size_t group) const;

  Workspaces workspaces_;
};

}  // namespace fused_lars
