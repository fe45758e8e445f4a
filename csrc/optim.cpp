#include "fused_lars/optim.h"

#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/grad_mode.h>
#include <torch/optim/serialize.h>

#include <string_view>
#include <unordered_set>

#include "checks.h"
#include "rounding_reference.h"
#include "step.h"
#include "step_calls.h"

namespace fused_lars {
namespace {

using torch::optim::OptimizerParamGroup;

const LARSOptions& options_of(const OptimizerParamGroup& group, size_t index) {
  const auto* options = dynamic_cast<const LARSOptions*>(&group.options());
  FUSED_LARS_CHECK(options, InvalidOption, "param group ", index,
                   " has the options of another optimizer; expected fused_lars::LARSOptions");
  return *options;
}

ParamState to_param_state(const LARSParamState& state) {
  return {.momentum_buffer = state.momentum_buffer(),
          .master_param = state.master_param(),
          .step = state.step(),
          .momentum_scale = state.momentum_scale(),
          .rng_state = state.rng_state(),
          .mark = state.mark};
}

std::unique_ptr<LARSParamState> to_lars_state(const ParamState& state) {
  auto result = std::make_unique<LARSParamState>();
  result->momentum_buffer(state.momentum_buffer)
      .master_param(state.master_param)
      .step(state.step)
      .momentum_scale(state.momentum_scale)
      .rng_state(state.rng_state);
  return result;
}

void check_options(const LARSOptions& options, size_t group) {
  validate(options.hyperparameters(), static_cast<long>(group));
  const auto dtype = options.momentum_dtype().value_or(at::kFloat);
  FUSED_LARS_CHECK(dtype == at::kFloat || is_half(dtype) || dtype == at::kChar, InvalidOption,
                   "Invalid momentum_dtype value in group ", group, ": ", dtype,
                   "; allowed: Float, BFloat16, Half, Char");
  const auto seed = options.rounding_seed();
  FUSED_LARS_CHECK(seed >= 0 && seed <= INT32_MAX, InvalidOption, "Invalid rounding_seed value in group ",
                   group, ": ", seed, "; allowed: 0 to 2^31 - 1");
}

// The state that an archive has for `param`, moved to the parameter's device and to the dtype of its state.
ParamState loaded_state(const LARSParamState& archived, const at::Tensor& param, size_t group) {
  auto state = to_param_state(archived);
  if (needs_momentum_scale(state.momentum_buffer)) {
    FUSED_LARS_CHECK(state.momentum_scale.defined(), InvalidTensor, "the archive's momentum_buffer in group ",
                     group, " is int8 and has no momentum_scale");
    state.momentum_buffer = decode_momentum(state.momentum_buffer, state.momentum_scale);
    state.momentum_scale = at::Tensor();
  }
  const auto convert = [&](const char* name, at::Tensor& tensor, at::ScalarType dtype, bool one_element) {
    if (!tensor.defined()) return;
    FUSED_LARS_CHECK(tensor.layout() == at::kStrided && is_parameter_dtype(tensor.scalar_type()),
                     InvalidTensor, "the archive's ", name, " in group ", group, " has dtype ",
                     tensor.scalar_type(), " and layout ", tensor.layout(),
                     "; allowed: Float, Double, Half, BFloat16 and Strided");
    FUSED_LARS_CHECK(
        one_element ? tensor.numel() == 1 : tensor.sizes() == param.sizes(), ShapeMismatch, "the archive's ",
        name, " in group ", group, " has shape ", tensor.sizes(), "; expected ",
        one_element ? std::string("1 element") : c10::str("the shape of its parameter, ", param.sizes()));
    tensor = tensor.to(param.device(), dtype);
  };
  const auto dtype = param.scalar_type();
  const bool stays_float =
      is_half(dtype) && state.momentum_buffer.defined() && state.momentum_buffer.scalar_type() == at::kFloat;
  convert("momentum_buffer", state.momentum_buffer, stays_float ? at::kFloat : dtype, false);
  convert("master_param", state.master_param, at::kFloat, false);
  convert("step", state.step, at::kFloat, true);
  if (state.rng_state.defined()) {
    FUSED_LARS_CHECK(state.rng_state.scalar_type() == at::kLong && state.rng_state.numel() == kRngStateSize,
                     InvalidTensor, "the archive's rng_state in group ", group, " is ",
                     state.rng_state.scalar_type(), state.rng_state.sizes(), "; expected Long [",
                     kRngStateSize, "]");
    state.rng_state = state.rng_state.to(param.device());
  }
  return state;
}

}  // namespace

LayerAdaptation::LayerAdaptation(const char* text) : kind_(kDecayed) {
  FUSED_LARS_CHECK(std::string_view(text) == "decayed", InvalidOption, "Invalid layer_adaptation value: \"",
                   text, "\"; allowed: true, false, \"decayed\"");
}

torch::IValue LayerAdaptation::to_ivalue() const {
  return kind_ == kDecayed ? torch::IValue("decayed") : torch::IValue(kind_ == kOn);
}

LayerAdaptation LayerAdaptation::from_ivalue(const torch::IValue& value) {
  return value.isString() ? LayerAdaptation(value.toStringRef().c_str()) : LayerAdaptation(value.toBool());
}

LARSOptions::LARSOptions(double lr) { this->lr(lr); }

Hyperparameters LARSOptions::hyperparameters() const {
  auto result = values_;
  result.layer_adaptation = layer_adaptation_.at(values_.weight_decay);
  // "decayed" leaves a group without weight decay unadapted. As in timm, it is not clipped either.
  if (layer_adaptation_ == "decayed" && !result.layer_adaptation) result.trust_clip = false;
  return result;
}

LARSOptions LARSOptions::inherit(const LARSOptions& defaults) const {
  const LARSOptions fresh;
  LARSOptions result = *this;
  const auto was_given = [this](const char* name) { return given_.count(name) != 0; };
  for_each_hyperparameter([&](const char* name, auto member) {
    if (!was_given(name) && values_.*member == fresh.values_.*member) {
      result.values_.*member = defaults.values_.*member;
    }
  });
  if (!was_given("layer_adaptation") && layer_adaptation_ == fresh.layer_adaptation_) {
    result.layer_adaptation_ = defaults.layer_adaptation_;
  }
  if (!was_given("momentum_dtype") && !momentum_dtype_) result.momentum_dtype_ = defaults.momentum_dtype_;
  if (!was_given("rounding_seed") && rounding_seed_ == fresh.rounding_seed_) {
    result.rounding_seed_ = defaults.rounding_seed_;
  }
  return result;
}

void LARSOptions::serialize(torch::serialize::OutputArchive& archive) const {
  for_each_hyperparameter([&](const std::string& name, auto member) {
    archive.write(
        name, name == "layer_adaptation" ? layer_adaptation_.to_ivalue() : torch::IValue(values_.*member));
  });
  archive.write("momentum_dtype",
                momentum_dtype_ ? torch::IValue(static_cast<int64_t>(*momentum_dtype_)) : torch::IValue());
  archive.write("rounding_seed", torch::IValue(rounding_seed_));
}

void LARSOptions::serialize(torch::serialize::InputArchive& archive) {
  const auto read = [&](const std::string& name) {
    torch::IValue stored;
    FUSED_LARS_CHECK(archive.try_read(name, stored), InvalidOption, "the archive has no option ", name,
                     "; expected one that fused_lars::LARS wrote");
    given_.insert(name);
    return stored;
  };
  for_each_hyperparameter([&](const std::string& name, auto member) {
    const auto stored = read(name);
    if (name == "layer_adaptation") {
      layer_adaptation_ = LayerAdaptation::from_ivalue(stored);
    } else {
      values_.*member = stored.to<std::decay_t<decltype(values_.*member)>>();
    }
  });
  const auto dtype = read("momentum_dtype");
  momentum_dtype_.reset();
  if (!dtype.isNone()) momentum_dtype_ = static_cast<at::ScalarType>(dtype.toInt());
  rounding_seed_ = read("rounding_seed").toInt();
}

bool operator==(const LARSOptions& left, const LARSOptions& right) {
  return left.values_ == right.values_ && left.layer_adaptation_ == right.layer_adaptation_ &&
         left.momentum_dtype_ == right.momentum_dtype_ && left.rounding_seed_ == right.rounding_seed_;
}

void LARSParamState::serialize(torch::serialize::OutputArchive& archive) const {
  _TORCH_OPTIM_SERIALIZE_TORCH_ARG(momentum_buffer);
  _TORCH_OPTIM_SERIALIZE_TORCH_ARG(master_param);
  _TORCH_OPTIM_SERIALIZE_TORCH_ARG(step);
  _TORCH_OPTIM_SERIALIZE_TORCH_ARG(momentum_scale);
  _TORCH_OPTIM_SERIALIZE_TORCH_ARG(rng_state);
}

void LARSParamState::serialize(torch::serialize::InputArchive& archive) {
  _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(at::Tensor, momentum_buffer);
  _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(at::Tensor, master_param);
  _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(at::Tensor, step);
  _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(at::Tensor, momentum_scale);
  _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(at::Tensor, rng_state);
}

LARS::LARS(const std::vector<OptimizerParamGroup>& param_groups, LARSOptions defaults)
    : Optimizer(std::vector<OptimizerParamGroup>{}, std::make_unique<LARSOptions>(defaults)) {
  validate(defaults.hyperparameters());
  for (const auto& group : param_groups) add_param_group(group);
}

LARS::LARS(std::vector<at::Tensor> params, LARSOptions defaults)
    : LARS({OptimizerParamGroup(std::move(params))}, defaults) {}

void LARS::add_param_group(const OptimizerParamGroup& param_group) {
  const size_t index = param_groups_.size();
  auto options = static_cast<const LARSOptions&>(*defaults_);
  if (param_group.has_options()) options = options_of(param_group, index).inherit(options);
  check_options(options, index);
  check_distinct(param_group.params(), index);
  Optimizer::add_param_group(OptimizerParamGroup(param_group.params()));
  param_groups_.back().set_options(std::make_unique<LARSOptions>(options));
}

// Two threads would update a parameter that is in the lists twice. torch.optim.Optimizer refuses it too.
void LARS::check_distinct(const std::vector<at::Tensor>& params, size_t group) const {
  std::unordered_set<const void*> known;
  for (const auto& other : param_groups_) {
    for (const auto& param : other.params()) known.insert(param.unsafeGetTensorImpl());
  }
  for (size_t i = 0; i < params.size(); ++i) {
    FUSED_LARS_CHECK(known.insert(params[i].unsafeGetTensorImpl()).second, InvalidTensor, "parameter ", i,
                     " of group ", group, " is in the optimizer already; expected every parameter once");
  }
}

at::Tensor LARS::step(LossClosure closure) {
  const at::NoGradGuard no_grad;
  at::Tensor loss;
  if (closure) {
    const at::AutoGradMode enable_grad(true);
    loss = closure();
  }

  std::vector<Hyperparameters> groups;
  for (const auto& group : param_groups_)
    groups.push_back(options_of(group, groups.size()).hyperparameters());
  StepCalls calls(groups);
  std::vector<std::pair<void*, ParamState>> new_states;  // stored after the step, which may throw
  std::vector<at::Tensor> with_master;
  int64_t position = 0;  // of the parameter in the optimizer
  for (size_t index = 0; index < groups.size(); ++index) {
    const auto& options = options_of(param_groups_[index], index);
    check_options(options, index);
    for (const auto& param : param_groups_[index].params()) {
      const StateOptions state_options{options.momentum_dtype(),
                                       rng_key(options.rounding_seed(), position++)};
      const auto& grad = param.grad();
      if (!grad.defined()) continue;
      const auto kept = state_.find(param.unsafeGetTensorImpl());
      ParamState state;
      if (kept != state_.end()) state = to_param_state(static_cast<const LARSParamState&>(*kept->second));
      const bool made = complete(state, param, groups[index], state_options);
      calls.add(index, param, grad, state);
      if (needs_master(groups[index], param.scalar_type())) with_master.push_back(param);
      if (made) new_states.emplace_back(param.unsafeGetTensorImpl(), std::move(state));
    }
  }
  calls.run(workspaces_);
  for (const auto& [key, state] : new_states) state_[key] = to_lars_state(state);
  for (const auto& param : with_master) {
    static_cast<LARSParamState&>(*state_.at(param.unsafeGetTensorImpl())).mark = mark_of(param);
  }
  return loss;
}

void LARS::save(torch::serialize::OutputArchive& archive) const {
  torch::optim::serialize<LARSParamState, LARSOptions>(archive, *this);
}

void LARS::load(torch::serialize::InputArchive& archive) {
  LARS loaded(param_groups_, static_cast<const LARSOptions&>(*defaults_));
  torch::optim::serialize<LARSParamState, LARSOptions>(archive, loaded);
  for (size_t index = 0; index < param_groups_.size(); ++index) {
    check_options(options_of(loaded.param_groups_[index], index), index);
    for (const auto& param : loaded.param_groups_[index].params()) {
      const auto kept = loaded.state_.find(param.unsafeGetTensorImpl());
      if (kept == loaded.state_.end()) continue;
      kept->second =
          to_lars_state(loaded_state(static_cast<const LARSParamState&>(*kept->second), param, index));
    }
  }
  state_ = std::move(loaded.state_);
  param_groups_ = std::move(loaded.param_groups_);
}

}  // namespace fused_lars
