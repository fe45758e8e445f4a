#include "checks.h"

#include <algorithm>
#include <string>

#include <ATen/MemoryOverlap.h>
#include <ATen/ops/_local_scalar_dense_ops.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>

#include "fused_lars/errors.h"
#include "overlap.h"
#include "rounding.h"

namespace fused_lars {

bool is_parameter_dtype(at::ScalarType dtype) {
  return dtype == at::kFloat || dtype == at::kDouble || dtype == at::kHalf || dtype == at::kBFloat16;
}

namespace {

void check_defined(const at::Tensor& tensor, const Name& name) {
  FUSED_LARS_CHECK(tensor.defined(), InvalidTensor, name, " is undefined");
}

void check_strided(const at::Tensor& tensor, const Name& name) {
  FUSED_LARS_CHECK(tensor.layout() == at::kStrided, InvalidTensor, name, " has layout ", tensor.layout(),
                   "; allowed: Strided");
}

void check_param(const at::Tensor& param, int64_t index, at::Device device) {
  const Name name{"params", index};
  check_strided(param, name);
  FUSED_LARS_CHECK(is_parameter_dtype(param.scalar_type()), InvalidTensor, name, " has dtype ",
                   param.scalar_type(), "; allowed: Float, Double, Half, BFloat16");
  FUSED_LARS_CHECK(param.device() == device, InvalidTensor, name, " is on ", param.device(),
                   "; expected the device of params[0], ", device);
}

// A gradient or state: it has the sizes and the device of its parameter, and one of some dtypes.
void check_companion(const at::Tensor& tensor, const Name& name, const at::Tensor& param,
                     at::ArrayRef<at::ScalarType> dtypes) {
  FUSED_LARS_CHECK(tensor.layout() == at::kStrided, InvalidTensor, name, " has layout ", tensor.layout(),
                   "; allowed: Strided (sparse gradients are not supported)");
  FUSED_LARS_CHECK(tensor.sym_sizes().equals(param.sym_sizes()), ShapeMismatch, name, " has shape ",
                   tensor.sym_sizes(), "; expected the shape of its parameter, ", param.sym_sizes());
  FUSED_LARS_CHECK(tensor.device() == param.device(), InvalidTensor, name, " is on ", tensor.device(),
                   "; expected the device of its parameter, ", param.device());
  const auto got = tensor.scalar_type();
  if (std::find(dtypes.begin(), dtypes.end(), got) != dtypes.end()) return;
  std::string allowed = toString(dtypes[0]);
  for (const auto dtype : dtypes.slice(1)) {
    if (dtype != dtypes[0]) allowed += c10::str(", ", dtype);
  }
  FUSED_LARS_CHECK(false, InvalidTensor, name, " has dtype ", got, "; allowed for a parameter of ",
                   param.scalar_type(), ": ", allowed);
}

// A vector that belongs to one parameter.
void check_vector(const at::Tensor& tensor, const Name& name, const c10::SymInt& size, at::ScalarType dtype,
                  at::Device device) {
  check_strided(tensor, name);
  FUSED_LARS_CHECK(tensor.dim() == 1 && tensor.sym_numel() == size, ShapeMismatch, name, " has shape ",
                   tensor.sym_sizes(), "; expected [", size, "]");
  FUSED_LARS_CHECK(tensor.scalar_type() == dtype && tensor.device() == device && tensor.is_contiguous(),
                   InvalidTensor, name, " is ", tensor.scalar_type(), " on ", tensor.device(),
                   " with strides ", tensor.sym_strides(), "; expected contiguous ", dtype, " on ", device);
}

void check_writable(const at::Tensor& tensor, const Name& name) {
  FUSED_LARS_CHECK(at::has_internal_overlap(tensor) != at::MemOverlap::Yes, InvalidTensor, name,
                   " overlaps itself (expanded, strides ", tensor.sym_strides(),
                   ") and cannot be updated in place");
}

void check_count(const char* list, size_t got, size_t expected, const char* of_what) {
  FUSED_LARS_CHECK(got == expected, InvalidTensor, list, " has ", got, " tensors; expected ", expected,
                   ", one for each ", of_what);
}

void check_group_sizes(at::IntArrayRef sizes, int64_t params) {
  int64_t in_groups = 0;
  for (const int64_t size : sizes) {
    FUSED_LARS_CHECK(size >= 0, InvalidTensor, "group_sizes has ", size, "; allowed: >= 0");
    FUSED_LARS_CHECK(size <= params - in_groups, InvalidTensor, "group_sizes ", sizes, " sum to more than ",
                     params, ", the number of parameters");
    in_groups += size;
  }
  FUSED_LARS_CHECK(in_groups == params, InvalidTensor, "group_sizes sum to ", in_groups, "; expected ",
                   params, ", the number of parameters");
}

void check_optional(const at::Tensor& tensor, const char* argument, at::IntArrayRef sizes,
                    at::ScalarType dtype, at::Device device) {
  if (!tensor.defined()) return;
  const Name name{argument};
  check_strided(tensor, name);
  FUSED_LARS_CHECK(tensor.sym_sizes().equals(c10::fromIntArrayRefSlow(sizes)), ShapeMismatch, name,
                   " has shape ", tensor.sym_sizes(), "; expected ", sizes);
  FUSED_LARS_CHECK(tensor.scalar_type() == dtype && tensor.device() == device, InvalidTensor, name, " is ",
                   tensor.scalar_type(), " on ", tensor.device(), "; expected ", dtype, " on ", device);
  FUSED_LARS_CHECK(tensor.is_contiguous(), InvalidTensor, name, " has strides ", tensor.sym_strides(),
                   "; expected contiguous");
}

void check_scalar(const at::Tensor& tensor, const Name& name, at::Device device) {
  if (!tensor.defined()) return;
  check_strided(tensor, name);
  FUSED_LARS_CHECK(tensor.sym_numel() == 1, ShapeMismatch, name, " has shape ", tensor.sym_sizes(),
                   "; expected 1 element");
  FUSED_LARS_CHECK(tensor.scalar_type() == at::kFloat && tensor.device() == device, InvalidTensor, name,
                   " is ", tensor.scalar_type(), " on ", tensor.device(), "; expected Float on ", device);
}

// The value of a scalar on the CPU. Nothing for one on another device, for which the host would have to wait,
// and for a fake tensor or one that torch.func wraps, which have none.
std::optional<double> value_on_host(const at::Tensor& scalar) {
  if (!scalar.device().is_cpu() || address_of(scalar) == 0) return {};
  const c10::DispatchKeySet cpu(c10::DispatchKey::CPU);  // so that no mode traces the read
  return at::_ops::_local_scalar_dense::redispatch(cpu, scalar).to<double>();
}

void check_lr_tensor(const at::Tensor& lr, Hyperparameters group, int64_t index, at::Device device) {
  const Name name{"lr", index};
  check_defined(lr, name);
  check_strided(lr, name);
  FUSED_LARS_CHECK(lr.sym_numel() == 1, InvalidLearningRate, "Tensor lr must be 1-element; ", name,
                   " has shape ", lr.sym_sizes());
  FUSED_LARS_CHECK(at::isFloatingType(lr.scalar_type()), InvalidLearningRate, name, " has dtype ",
                   lr.scalar_type(), "; allowed: a floating-point dtype");
  FUSED_LARS_CHECK(lr.device().is_cpu() || lr.device() == device, InvalidLearningRate, name, " is on ",
                   lr.device(), "; allowed: cpu or the parameters' device, ", device);
  if (const auto value = value_on_host(lr)) {
    group.lr = *value;
    validate(group, static_cast<long>(index));
  }
}

void check_workspace(const at::Tensor& workspace, at::Device device) {
  if (!workspace.defined()) return;
  check_strided(workspace, {"workspace"});
  FUSED_LARS_CHECK(workspace.scalar_type() == at::kInt && workspace.device() == device &&
                       workspace.is_contiguous() && workspace.dim() == 1,
                   InvalidTensor, "workspace is ", workspace.scalar_type(), workspace.sym_sizes(), " on ",
                   workspace.device(), "; expected a contiguous vector of Int on ", device);
  FUSED_LARS_CHECK(
      address_of(workspace) % 8 == 0, InvalidTensor,
      "workspace starts at an address that is no multiple of 8; expected a tensor that is no slice");
}

// The device of a step: that of params[0]. Without parameters it is that of the first other tensor.
at::Device device_of(at::TensorList params, std::initializer_list<at::Tensor> others) {
  if (!params.empty()) {
    check_defined(params[0], {"params", 0});
    return params[0].device();
  }
  for (const auto& tensor : others) {
    if (tensor.defined()) return tensor.device();
  }
  return at::kCPU;
}

// A state list, which holds one tensor for each parameter that needs one.
class StateList {
 public:
  StateList(const char* name, at::TensorList list, const char* whose)
      : name_(name), list_(list), whose_(whose) {}

  // The tensor of the next parameter. If the list is too short it is undefined, and check_all_taken throws.
  at::Tensor take() {
    const size_t index = taken_++;
    if (index >= list_.size()) return {};
    check_defined(list_[index], {name_, static_cast<int64_t>(index)});
    return list_[index];
  }
  void check_all_taken() const { check_count(name_, list_.size(), taken_, whose_); }

 private:
  const char* name_;
  at::TensorList list_;
  const char* whose_;
  size_t taken_ = 0;
};

// Calls f(name, tensor, is_written) for every tensor of a step.
template <typename F>
void for_each_tensor(const Step& step, F f) {
  int64_t index = 0, buffer = 0, master = 0, applied = 0, scale = 0, rng = 0, group = 0;
  for (const auto& tensor : step.tensors) {
    f(Name{"params", index}, tensor.param, true);
    f(Name{"grads", index++}, tensor.grad, false);
    if (tensor.momentum_buffer.defined()) f(Name{"momentum_buffers", buffer++}, tensor.momentum_buffer, true);
    if (tensor.master_param.defined()) f(Name{"master_params", master++}, tensor.master_param, true);
    if (tensor.step.defined()) f(Name{"steps", applied++}, tensor.step, true);
    if (tensor.momentum_scale.defined()) f(Name{"momentum_scales", scale++}, tensor.momentum_scale, true);
    if (tensor.rng_state.defined()) f(Name{"rng_states", rng++}, tensor.rng_state, true);
  }
  for (const auto& lr : step.lr_tensors) f(Name{"lr", group++}, lr, false);
  f(Name{"squared_norms"}, step.squared_norms, false);
  f(Name{"grad_scale"}, step.grad_scale, false);
  f(Name{"found_inf"}, step.found_inf, false);
  f(Name{"trust_ratios"}, step.trust_ratios, true);
  f(Name{"layer_norms"}, step.layer_norms, true);
  f(Name{"workspace"}, step.workspace, true);
}

// Fills step.tensors. On the way it checks that all tensors are defined, that parameters are what they may
// be, and that the state lists have the right lengths.
void assemble(const StepLists& lists, at::Device device, Step& step) {
  StateList momentum_buffers("momentum_buffers", lists.momentum_buffers,
                             "parameter of a group with momentum");
  StateList master_params("master_params", lists.master_params,
                          "fp16 or bf16 parameter of a group with master_weights");
  StateList steps("steps", lists.steps, "parameter of a group with momentum and dampening");
  StateList momentum_scales("momentum_scales", lists.momentum_scales, "int8 momentum buffer");
  StateList rng_states("rng_states", lists.rng_states, "parameter that is rounded stochastically");
  step.tensors.reserve(lists.params.size());
  int64_t index = 0;
  for (size_t group = 0; group < step.groups.size(); ++group) {
    const auto& hyperparameters = step.groups[group];
    for (const int64_t end = index + lists.group_sizes[group]; index < end; ++index) {
      const auto &param = lists.params[index], &grad = lists.grads[index];
      check_defined(param, {"params", index});
      check_defined(grad, {"grads", index});
      check_param(param, index, device);
      StepTensor tensor{.param = param,
                        .grad = grad,
                        .momentum_buffer = {},
                        .master_param = {},
                        .step = {},
                        .momentum_scale = {},
                        .rng_state = {},
                        .group = static_cast<int64_t>(group)};
      if (needs_momentum_buffer(hyperparameters)) tensor.momentum_buffer = momentum_buffers.take();
      if (needs_master(hyperparameters, param.scalar_type())) tensor.master_param = master_params.take();
      if (needs_step(hyperparameters)) tensor.step = steps.take();
      if (needs_momentum_scale(tensor.momentum_buffer)) tensor.momentum_scale = momentum_scales.take();
      if (needs_rng_state(hyperparameters, tensor.weight().scalar_type(), tensor.momentum_buffer)) {
        tensor.rng_state = rng_states.take();
      }
      step.tensors.push_back(std::move(tensor));
    }
  }
  momentum_buffers.check_all_taken();
  master_params.check_all_taken();
  steps.check_all_taken();
  momentum_scales.check_all_taken();
  rng_states.check_all_taken();
}

// Checks that gradients and state fit their parameters.
void check_companions(const Step& step, at::Device device) {
  int64_t index = 0, buffer = 0, master = 0, applied = 0, scale = 0, rng = 0;
  for (const auto& tensor : step.tensors) {
    const auto dtype = tensor.param.scalar_type();
    check_companion(tensor.grad, {"grads", index}, tensor.param, {dtype, at::kFloat});
    check_writable(tensor.param, {"params", index});
    if (tensor.momentum_buffer.defined()) {
      const Name name{"momentum_buffers", buffer++};
      check_companion(tensor.momentum_buffer, name, tensor.param, momentum_dtypes(dtype));
      check_writable(tensor.momentum_buffer, name);
    }
    if (tensor.momentum_scale.defined()) {
      // Blocks are runs of memory, so the buffer may have no gaps.
      FUSED_LARS_CHECK(tensor.momentum_buffer.is_non_overlapping_and_dense(), InvalidTensor,
                       Name{"momentum_buffers", buffer - 1}, " is int8 with strides ",
                       tensor.momentum_buffer.sym_strides(), "; expected a dense tensor");
      check_vector(tensor.momentum_scale, {"momentum_scales", scale++},
                   scale_blocks(tensor.param.sym_numel()), at::kFloat, device);
    }
    if (tensor.rng_state.defined()) {
      check_vector(tensor.rng_state, {"rng_states", rng++}, kRngStateSize, at::kLong, device);
    }
    if (tensor.master_param.defined()) {
      const Name name{"master_params", master++};
      check_companion(tensor.master_param, name, tensor.param, {at::kFloat});
      check_writable(tensor.master_param, name);
    }
    if (tensor.step.defined()) check_scalar(tensor.step, {"steps", applied++}, device);
    ++index;
  }
}

// Checks the tensors that a step may be given beside its lists.
void check_options(const Step& step, at::Device device) {
  for (size_t group = 0; group < step.lr_tensors.size(); ++group) {
    check_lr_tensor(step.lr_tensors[group], step.groups[group], static_cast<int64_t>(group), device);
  }
  const auto count = static_cast<int64_t>(step.tensors.size());
  check_optional(step.squared_norms, "squared_norms", {count, 2}, norm_dtype(device), device);
  check_optional(step.trust_ratios, "trust_ratios", {count}, norm_dtype(device), device);
  check_optional(step.layer_norms, "layer_norms", {count, 2}, norm_dtype(device), device);
  check_scalar(step.grad_scale, {"grad_scale"}, device);
  check_scalar(step.found_inf, {"found_inf"}, device);
  check_workspace(step.workspace, device);
}

void check_shared_memory(const Step& step, size_t most_tensors) {
  SharedMemoryCheck shared_memory(most_tensors);
  for_each_tensor(step, [&](const Name& name, const at::Tensor& tensor, bool written) {
    shared_memory.add(name, tensor, written);
  });
  shared_memory.run();
}

}  // namespace

void check_and_assemble(const StepLists& lists, Step& step) {
  check_count("grads", lists.grads.size(), lists.params.size(), "parameter");
  check_count("group_sizes", lists.group_sizes.size(), step.groups.size(), "group");
  check_group_sizes(lists.group_sizes, static_cast<int64_t>(lists.params.size()));
  const auto device = device_of(lists.params, {step.squared_norms, step.grad_scale, step.found_inf,
                                               step.trust_ratios, step.layer_norms, step.workspace});
  assemble(lists, device, step);
  check_companions(step, device);
  check_options(step, device);
  constexpr size_t kOptions = 6;  // squared_norms to workspace
  size_t tensors = step.lr_tensors.size() + kOptions;
  for (const auto& list : {lists.params, lists.grads, lists.momentum_buffers, lists.master_params,
                           lists.steps, lists.momentum_scales, lists.rng_states}) {
    tensors += list.size();
  }
  check_shared_memory(step, tensors);
}

void check_and_assemble(at::TensorList params, at::TensorList grads, at::IntArrayRef group_sizes,
                        NormCall& call) {
  check_count("grads", grads.size(), params.size(), "parameter");
  check_count("group_sizes", group_sizes.size(), call.groups.size(), "group");
  check_group_sizes(group_sizes, static_cast<int64_t>(params.size()));
  const auto device = device_of(params, {call.grad_scale, call.workspace});
  for (size_t i = 0; i < params.size(); ++i) {
    const auto index = static_cast<int64_t>(i);
    check_defined(params[i], {"params", index});
    check_param(params[i], index, device);
    const auto dtype = params[i].scalar_type();
    // An fp32 tensor here may be the master of an fp16 or bf16 parameter. Its gradient is the parameter's.
    check_defined(grads[i], {"grads", index});
    const auto low = grads[i].scalar_type() == at::kHalf ? at::kHalf : at::kBFloat16;
    check_companion(grads[i], {"grads", index}, params[i], {dtype, dtype == at::kFloat ? low : at::kFloat});
  }
  check_scalar(call.grad_scale, {"grad_scale"}, device);
  check_workspace(call.workspace, device);
  call.params = params.vec();
  call.grads = grads.vec();
  call.group_of.reserve(params.size());
  for (size_t group = 0; group < group_sizes.size(); ++group) {
    call.group_of.insert(call.group_of.end(), group_sizes[group], static_cast<int64_t>(group));
  }
}

void check_autograd_allows(const Step& step) {
  using Result = torch::autograd::can_mutate_inplace_result;
  bool any_requires_grad = false;
  for_each_tensor(step, [&](const Name&, const at::Tensor& tensor, bool) {
    any_requires_grad |= tensor.defined() && tensor.requires_grad();
  });
  for_each_tensor(step, [&](const Name& name, const at::Tensor& tensor, bool written) {
    if (!written || !tensor.defined()) return;
    FUSED_LARS_CHECK(!tensor.is_inference() || c10::InferenceMode::is_enabled(), InvalidTensor, name,
                     " is an inference tensor; allowed: in torch.inference_mode() only");
    const auto result = torch::autograd::can_mutate_inplace(tensor, any_requires_grad);
    FUSED_LARS_CHECK(result == Result::success, InvalidTensor, name, " is ",
                     result == Result::is_leaf        ? "a leaf that requires grad"
                     : result == Result::view_of_leaf ? "a view of a leaf that requires grad"
                                                      : "a view that autograd does not follow",
                     "; allowed: under torch.no_grad() only");
  });
}

}  // namespace fused_lars
