#include "fused_lars/optim.h"

#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/grad_mode.h>
#include <torch/optim/serialize.h>

#include <unordered_set>

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
  return {state.momentum_buffer(), state.master_param(), state.step()};
}

std::unique_ptr<LARSParamState> to_lars_state(const ParamState& state) {
  auto result = std::make_unique<LARSParamState>();
  result->momentum_buffer(state.momentum_buffer).master_param(state.master_param).step(state.step);
  return result;
}

}  // namespace

LARSOptions::LARSOptions(double lr) : lr_(lr) {}

template <typename Visit>
void LARSOptions::for_each_option(Visit visit) {
  visit("lr", &LARSOptions::lr_, &Hyperparameters::lr);
  visit("momentum", &LARSOptions::momentum_, &Hyperparameters::momentum);
  visit("weight_decay", &LARSOptions::weight_decay_, &Hyperparameters::weight_decay);
  visit("trust_coefficient", &LARSOptions::trust_coefficient_, &Hyperparameters::trust_coefficient);
  visit("eps", &LARSOptions::eps_, &Hyperparameters::eps);
  visit("dampening", &LARSOptions::dampening_, &Hyperparameters::dampening);
  visit("nesterov", &LARSOptions::nesterov_, &Hyperparameters::nesterov);
  visit("maximize", &LARSOptions::maximize_, &Hyperparameters::maximize);
  visit("trust_clip", &LARSOptions::trust_clip_, &Hyperparameters::trust_clip);
  visit("layer_adaptation", &LARSOptions::layer_adaptation_, &Hyperparameters::layer_adaptation);
  visit("classic_momentum", &LARSOptions::classic_momentum_, &Hyperparameters::classic_momentum);
  visit("master_weights", &LARSOptions::master_weights_, &Hyperparameters::master_weights);
}

Hyperparameters LARSOptions::hyperparameters() const {
  Hyperparameters result;
  for_each_option([&](const char*, auto option, auto field) { result.*field = this->*option; });
  return result;
}

LARSOptions LARSOptions::inherit(const LARSOptions& defaults) const {
  LARSOptions result = *this;
  for_each_option([&](const char*, auto option, auto) {
    if (!(this->*option).given()) result.*option = defaults.*option;
  });
  return result;
}

void LARSOptions::serialize(torch::serialize::OutputArchive& archive) const {
  for_each_option([&](const char* name, auto, auto field) {
    archive.write(name, torch::IValue(hyperparameters().*field));
  });
}

void LARSOptions::serialize(torch::serialize::InputArchive& archive) {
  for_each_option([&](const char* name, auto option, auto field) {
    torch::IValue value;
    FUSED_LARS_CHECK(archive.try_read(name, value), InvalidOption, "the archive has no option ", name,
                     "; expected one that fused_lars::LARS wrote");
    this->*option = value.to<std::decay_t<decltype(std::declval<Hyperparameters>().*field)>>();
  });
}

bool operator==(const LARSOptions& left, const LARSOptions& right) {
  bool equal = true;
  const auto a = left.hyperparameters(), b = right.hyperparameters();
  LARSOptions::for_each_option([&](const char*, auto, auto field) { equal &= a.*field == b.*field; });
  return equal;
}

void LARSParamState::serialize(torch::serialize::OutputArchive& archive) const {
  _TORCH_OPTIM_SERIALIZE_TORCH_ARG(momentum_buffer);
  _TORCH_OPTIM_SERIALIZE_TORCH_ARG(master_param);
  _TORCH_OPTIM_SERIALIZE_TORCH_ARG(step);
}

void LARSParamState::serialize(torch::serialize::InputArchive& archive) {
  _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(at::Tensor, momentum_buffer);
  _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(at::Tensor, master_param);
  _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(at::Tensor, step);
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
  validate(options.hyperparameters(), static_cast<long>(index));
  check_distinct(param_group.params(), index);
  Optimizer::add_param_group(OptimizerParamGroup(param_group.params()));
  param_groups_.back().set_options(std::make_unique<LARSOptions>(options));
}

// A parameter that comes twice would be updated by two threads at once. Torch's Python class refuses it too.
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
  std::vector<std::pair<void*, ParamState>> new_states;  // entered when the step has succeeded
  for (size_t index = 0; index < groups.size(); ++index) {
    for (const auto& param : param_groups_[index].params()) {
      const auto& grad = param.grad();
      if (!grad.defined()) continue;
      const auto kept = state_.find(param.unsafeGetTensorImpl());
      ParamState state;
      if (kept != state_.end()) state = to_param_state(static_cast<const LARSParamState&>(*kept->second));
      const bool made = complete(state, param, groups[index]);
      calls.add(index, param, grad, state);
      if (made) new_states.emplace_back(param.unsafeGetTensorImpl(), std::move(state));
    }
  }
  calls.run(workspaces_);
  for (const auto& [key, state] : new_states) state_[key] = to_lars_state(state);
  return loss;
}

void LARS::save(torch::serialize::OutputArchive& archive) const {
  torch::optim::serialize<LARSParamState, LARSOptions>(archive, *this);
}

void LARS::load(torch::serialize::InputArchive& archive) {
  LARS loaded(param_groups_, static_cast<const LARSOptions&>(*defaults_));
  torch::optim::serialize<LARSParamState, LARSOptions>(archive, loaded);
  for (size_t index = 0; index < param_groups_.size(); ++index) {
    validate(options_of(loaded.param_groups_[index], index).hyperparameters(), static_cast<long>(index));
    for (const auto& param : loaded.param_groups_[index].params()) {
      const auto kept = loaded.state_.find(param.unsafeGetTensorImpl());
      if (kept == loaded.state_.end()) continue;
      auto state = to_param_state(static_cast<const LARSParamState&>(*kept->second));
      for (auto* tensor : {&state.momentum_buffer, &state.master_param}) {
        if (!tensor->defined()) continue;
        FUSED_LARS_CHECK(tensor->sizes() == param.sizes(), ShapeMismatch, "the archive's state in group ",
                         index, " has shape ", tensor->sizes(), "; expected the shape of its parameter, ",
                         param.sizes());
        *tensor = tensor->to(param.device());
      }
      if (state.step.defined()) state.step = state.step.to(param.device());
      kept->second = to_lars_state(state);
    }
  }
  state_ = std::move(loaded.state_);
  param_groups_ = std::move(loaded.param_groups_);
}

}  // namespace fused_lars
