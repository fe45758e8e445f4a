#include "step_calls.h"

#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>

#include "checks.h"
#include "fused_lars/ops.h"
#include "rounding_reference.h"
#include "step.h"

namespace fused_lars {
namespace {

void convert_momentum(ParamState& state, at::ScalarType dtype) {
  auto& buffer = state.momentum_buffer;
  if (needs_momentum_scale(buffer)) buffer = decode_momentum(buffer, state.momentum_scale);
  state.momentum_scale = at::Tensor();
  if (dtype != at::kChar) {
    buffer = buffer.to(dtype);
    return;
  }
  auto encoded = encode_momentum(buffer);
  buffer = std::move(encoded.codes);
  state.momentum_scale = std::move(encoded.scale);
}

at::Tensor new_rng_state(int64_t key, at::Device device) {
  auto state = at::zeros({kRngStateSize}, at::kLong);
  state.select(0, 0).fill_(key);
  return state.to(device);
}

}  // namespace

ParamMark mark_of(const at::Tensor& param) {
  if (param.is_inference() || !param.has_storage()) return std::nullopt;
  return std::make_pair(param._version(), static_cast<const void*>(param.const_data_ptr()));
}

bool complete(ParamState& state, const at::Tensor& param, const Hyperparameters& group,
              const StateOptions& options) {
  const bool master = needs_master(group, param.scalar_type());
  const auto weight_dtype = master ? at::kFloat : param.scalar_type();
  const auto dtype = options.momentum_dtype.value_or(weight_dtype);
  bool made = false;
  const auto make = [&](at::Tensor& tensor, bool needed, auto initial) {
    if (!needed || tensor.defined()) return;
    tensor = initial();
    made = true;
  };
  const bool had_buffer = state.momentum_buffer.defined();
  // A buffer of a group that had other options before.
  const bool is_wider =
      !options.momentum_dtype && had_buffer && state.momentum_buffer.scalar_type() == at::kFloat;
  if (had_buffer && state.momentum_buffer.scalar_type() != dtype && !is_wider) {
    convert_momentum(state, dtype);
    made = true;
  }
  make(state.momentum_buffer, needs_momentum_buffer(group),
       [&] { return at::zeros_like(param, param.options().dtype(dtype), at::MemoryFormat::Preserve); });
  make(state.momentum_scale, needs_momentum_scale(state.momentum_buffer),
       [&] { return at::zeros({scale_blocks(param.numel())}, param.options().dtype(at::kFloat)); });
  make(state.rng_state, needs_rng_state(group, weight_dtype, state.momentum_buffer),
       [&] { return new_rng_state(options.rng_key, param.device()); });
  if (master && state.master_param.defined() && (!state.mark || state.mark != mark_of(param))) {
    const auto& old = state.master_param;
    // If these differ, the op refuses the step.
    if (param.sizes() == old.sizes() && param.device() == old.device()) take_over(param, old);
  }
  make(state.master_param, master, [&] { return param.detach().to(at::kFloat); });
  // If there was a buffer before the group had dampening, the first update has been made.
  make(state.step, needs_step(group),
       [&] { return at::full({}, had_buffer ? 1.0 : 0.0, param.options().dtype(at::kFloat)); });
  return made;
}

void StepCalls::add(size_t group, const at::Tensor& param, const at::Tensor& grad, const ParamState& state) {
  auto call = std::find_if(calls_.begin(), calls_.end(),
                           [&](const Call& other) { return other.device == param.device(); });
  if (call == calls_.end()) {
    call = calls_.emplace(call, param.device(), groups_.size());
  }
  call->params.push_back(param);
  call->grads.push_back(grad);
  if (needs_momentum_buffer(groups_[group])) call->momentum_buffers.push_back(state.momentum_buffer);
  if (needs_master(groups_[group], param.scalar_type())) call->master_params.push_back(state.master_param);
  if (needs_step(groups_[group])) call->steps.push_back(state.step);
  const auto buffer = needs_momentum_buffer(groups_[group]) ? state.momentum_buffer : at::Tensor();
  const bool has_master = needs_master(groups_[group], param.scalar_type());
  const auto weight_dtype = has_master ? at::kFloat : param.scalar_type();
  if (needs_momentum_scale(buffer)) call->momentum_scales.push_back(state.momentum_scale);
  if (needs_rng_state(groups_[group], weight_dtype, buffer)) call->rng_states.push_back(state.rng_state);
  ++call->group_sizes[group];
}

void StepCalls::run(Workspaces& workspaces) const {
  // An op checks its own arguments before it writes. But when the second call throws, the first has been
  // made. So all calls are checked before the first.
  if (calls_.size() > 1) {
    for (const auto& group : groups_) validate(group);
    for (const auto& call : calls_) {
      Step step;
      step.groups = groups_;
      check_and_assemble(call.lists(), step);
    }
  }
  for (const auto& call : calls_) {
    const auto step = [&](const StepOptions& options) { step_(call.lists(), groups_, options); };
    if (!call.device.is_cuda()) {
      step({});
      continue;
    }
    auto& workspaces_here = workspaces[call.device];
    if (workspaces_here.empty()) {
      workspaces_here.push_back(at::zeros({0}, at::TensorOptions(call.device).dtype(at::kInt)));
    }
    // The op may set this tensor to larger memory; what is in the list keeps its own.
    const auto workspace = workspaces_here.back().detach();
    step({.workspace = workspace});
    if (!workspace.is_alias_of(workspaces_here.back())) workspaces_here.push_back(workspace);
  }
}

}  // namespace fused_lars
