#include "checks.h"

#include <ATen/MemoryOverlap.h>

#include "fused_lars/errors.h"

namespace fused_lars {

at::ScalarType norm_dtype(at::Device device) { return device.is_mps() ? at::kFloat : at::kDouble; }

namespace {

// Names a tensor in a message: grads[3].
struct Name {
  const char* list;
  int64_t index;
};
std::ostream& operator<<(std::ostream& out, const Name& name) {
  return out << name.list << '[' << name.index << ']';
}

bool is_parameter_dtype(at::ScalarType dtype) {
  return dtype == at::kFloat || dtype == at::kDouble || dtype == at::kHalf || dtype == at::kBFloat16;
}

void check_param(const at::Tensor& param, int64_t index, at::Device device) {
  const Name name{"params", index};
  FUSED_LARS_CHECK(param.layout() == at::kStrided, InvalidTensor, name, " has layout ", param.layout(),
                   "; allowed: Strided");
  FUSED_LARS_CHECK(is_parameter_dtype(param.scalar_type()), InvalidTensor, name, " has dtype ",
                   param.scalar_type(), "; allowed: Float, Double, Half, BFloat16");
  FUSED_LARS_CHECK(param.device() == device, InvalidTensor, name, " is on ", param.device(),
                   "; expected the device of params[0], ", device);
}

// A tensor that goes with params[index]: same sizes and device, and a dtype of two.
void check_companion(const at::Tensor& tensor, Name name, const at::Tensor& param, at::ScalarType dtype,
                     at::ScalarType other_dtype) {
  FUSED_LARS_CHECK(tensor.defined(), InvalidTensor, name, " is undefined");
  FUSED_LARS_CHECK(tensor.layout() == at::kStrided, InvalidTensor, name, " has layout ", tensor.layout(),
                   "; allowed: Strided (sparse gradients are not supported)");
  FUSED_LARS_CHECK(tensor.sym_sizes().equals(param.sym_sizes()), ShapeMismatch, name, " has shape ",
                   tensor.sym_sizes(), "; expected the shape of its parameter, ", param.sym_sizes());
  FUSED_LARS_CHECK(tensor.device() == param.device(), InvalidTensor, name, " is on ", tensor.device(),
                   "; expected the device of its parameter, ", param.device());
  const auto got = tensor.scalar_type();
  FUSED_LARS_CHECK(got == dtype || got == other_dtype, InvalidTensor, name, " has dtype ", got,
                   "; allowed for a parameter of ", param.scalar_type(), ": ", dtype,
                   dtype == other_dtype ? "" : c10::str(", ", other_dtype));
}

void check_writable(const at::Tensor& tensor, Name name) {
  FUSED_LARS_CHECK(at::has_internal_overlap(tensor) != at::MemOverlap::Yes, InvalidTensor, name,
                   " overlaps itself (expanded, strides ", tensor.sym_strides(),
                   ") and cannot be updated in place");
}

void check_count(const char* list, size_t got, size_t expected, const char* of_what) {
  FUSED_LARS_CHECK(got == expected, InvalidTensor, list, " has ", got, " tensors; expected ", expected,
                   ", one for each ", of_what);
}

void check_optional(const at::Tensor& tensor, const char* name, at::IntArrayRef sizes, at::ScalarType dtype,
                    at::Device device) {
  if (!tensor.defined()) return;
  FUSED_LARS_CHECK(tensor.sym_sizes().equals(c10::fromIntArrayRefSlow(sizes)), ShapeMismatch, name,
                   " has shape ", tensor.sym_sizes(), "; expected ", sizes);
  FUSED_LARS_CHECK(tensor.scalar_type() == dtype && tensor.device() == device, InvalidTensor, name, " is ",
                   tensor.scalar_type(), " on ", tensor.device(), "; expected ", dtype, " on ", device);
  FUSED_LARS_CHECK(tensor.is_contiguous(), InvalidTensor, name, " has strides ", tensor.sym_strides(),
                   "; expected contiguous");
}

void check_scalar(const at::Tensor& tensor, const char* name, at::Device device) {
  if (!tensor.defined()) return;
  FUSED_LARS_CHECK(tensor.sym_numel() == 1, ShapeMismatch, name, " has shape ", tensor.sym_sizes(),
                   "; expected 1 element");
  FUSED_LARS_CHECK(tensor.scalar_type() == at::kFloat && tensor.device() == device, InvalidTensor, name,
                   " is ", tensor.scalar_type(), " on ", tensor.device(), "; expected Float on ", device);
}

void check_lr_tensor(const at::Tensor& lr, int64_t group, at::Device device) {
  if (!lr.defined()) return;
  const Name name{"lr", group};
  FUSED_LARS_CHECK(lr.sym_numel() == 1, InvalidLearningRate, "Tensor lr must be 1-element; ", name,
                   " has shape ", lr.sym_sizes());
  FUSED_LARS_CHECK(at::isFloatingType(lr.scalar_type()), InvalidLearningRate, name, " has dtype ",
                   lr.scalar_type(), "; allowed: a floating-point dtype");
  FUSED_LARS_CHECK(lr.device().is_cpu() || lr.device() == device, InvalidLearningRate, name, " is on ",
                   lr.device(), "; allowed: cpu or the parameters' device, ", device);
}

void check_workspace(const at::Tensor& workspace, at::Device device) {
  if (!workspace.defined()) return;
  FUSED_LARS_CHECK(workspace.scalar_type() == at::kInt && workspace.device() == device &&
                       workspace.is_contiguous() && workspace.dim() == 1,
                   InvalidTensor, "workspace is ", workspace.scalar_type(), workspace.sym_sizes(), " on ",
                   workspace.device(), "; expected a contiguous vector of Int on ", device);
}

}  // namespace

void check_and_assemble(const StepLists& lists, Step& step) {
  const auto& params = lists.params;
  const int64_t count = static_cast<int64_t>(params.size());
  check_count("grads", lists.grads.size(), params.size(), "parameter");
  check_count("group_sizes", lists.group_sizes.size(), step.groups.size(), "group");
  int64_t in_groups = 0;
  for (const int64_t size : lists.group_sizes) {
    FUSED_LARS_CHECK(size >= 0, InvalidTensor, "group_sizes has ", size, "; allowed: >= 0");
    in_groups += size;
  }
  FUSED_LARS_CHECK(in_groups == count, InvalidTensor, "group_sizes sum to ", in_groups, "; expected ", count,
                   ", the number of parameters");
  if (count == 0) return;
  FUSED_LARS_CHECK(params[0].defined(), InvalidTensor, "params[0] is undefined");
  const auto device = params[0].device();

  step.tensors.reserve(count);
  size_t buffers = 0, masters = 0, steps = 0;
  const auto take = [](at::TensorList list, size_t& next) {
    return next < list.size() ? list[next++] : (++next, at::Tensor());
  };
  for (int64_t i = 0, group = 0, left = lists.group_sizes[0]; i < count; ++i, --left) {
    while (left == 0) left = lists.group_sizes[++group];
    const auto& hyperparameters = step.groups[group];
    FUSED_LARS_CHECK(params[i].defined(), InvalidTensor, Name{"params", i}, " is undefined");
    check_param(params[i], i, device);
    const auto dtype = params[i].scalar_type();
    StepTensor tensor{.param = params[i],
                      .grad = lists.grads[i],
                      .momentum_buffer = {},
                      .master_param = {},
                      .step = {},
                      .group = group};
    if (needs_momentum_buffer(hyperparameters))
      tensor.momentum_buffer = take(lists.momentum_buffers, buffers);
    if (needs_master(hyperparameters, dtype)) tensor.master_param = take(lists.master_params, masters);
    if (needs_step(hyperparameters)) tensor.step = take(lists.steps, steps);
    step.tensors.push_back(std::move(tensor));
  }
  check_count("momentum_buffers", lists.momentum_buffers.size(), buffers,
              "parameter of a group with momentum");
  check_count("master_params", lists.master_params.size(), masters,
              "fp16 or bf16 parameter of a group with master_weights");
  check_count("steps", lists.steps.size(), steps, "parameter of a group with momentum and dampening");

  int64_t index = 0, buffer = 0, master = 0, applied = 0;
  for (const auto& tensor : step.tensors) {
    const auto dtype = tensor.param.scalar_type();
    check_companion(tensor.grad, {"grads", index}, tensor.param, dtype, at::kFloat);
    check_writable(tensor.param, {"params", index});
    if (tensor.momentum_buffer.defined()) {
      const Name name{"momentum_buffers", buffer++};
      check_companion(tensor.momentum_buffer, name, tensor.param, dtype, at::kFloat);
      check_writable(tensor.momentum_buffer, name);
    }
    if (tensor.master_param.defined()) {
      const Name name{"master_params", master++};
      check_companion(tensor.master_param, name, tensor.param, at::kFloat, at::kFloat);
      check_writable(tensor.master_param, name);
    }
    if (tensor.step.defined()) check_scalar(tensor.step, c10::str(Name{"steps", applied++}).c_str(), device);
    ++index;
  }

  if (!step.lr_tensors.empty()) check_count("lr", step.lr_tensors.size(), step.groups.size(), "group");
  for (size_t group = 0; group < step.lr_tensors.size(); ++group) {
    check_lr_tensor(step.lr_tensors[group], static_cast<int64_t>(group), device);
  }
  check_optional(step.squared_norms, "squared_norms", {count, 2}, norm_dtype(device), device);
  check_optional(step.trust_ratios, "trust_ratios", {count}, norm_dtype(device), device);
  check_scalar(step.grad_scale, "grad_scale", device);
  check_scalar(step.found_inf, "found_inf", device);
  check_workspace(step.workspace, device);
}

void check_norm_arguments(at::TensorList params, at::TensorList grads, const at::Tensor& workspace) {
  check_count("grads", grads.size(), params.size(), "parameter");
  for (size_t i = 0; i < params.size(); ++i) {
    const auto index = static_cast<int64_t>(i);
    FUSED_LARS_CHECK(params[i].defined(), InvalidTensor, Name{"params", index}, " is undefined");
    check_param(params[i], index, params[0].device());
    const auto dtype = params[i].scalar_type();
    // An fp32 param may be the master of an fp16 or bf16 one, whose gradient it gets.
    FUSED_LARS_CHECK(grads[i].defined(), InvalidTensor, Name{"grads", index}, " is undefined");
    const auto low = grads[i].scalar_type() == at::kHalf ? at::kHalf : at::kBFloat16;
    check_companion(grads[i], {"grads", index}, params[i], dtype, dtype == at::kFloat ? low : at::kFloat);
  }
  if (!params.empty()) check_workspace(workspace, params[0].device());
}

}  // namespace fused_lars
