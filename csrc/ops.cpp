// The schemas of torch.ops.fused_lars, and what is registered for each dispatch key.

#include "fused_lars/ops.h"

#include <type_traits>
#include <utility>

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/jit/runtime/operator.h>
#include <torch/library.h>

#include "checks.h"
#include "dense.h"
#include "fused_lars/errors.h"
#include "rounding_reference.h"
#include "step.h"

namespace fused_lars {
namespace {

// The type of a member of Hyperparameters.
template <typename T>
T type_of(T Hyperparameters::*);

// The hyperparameters that `take` chooses, as arguments of a schema: "bool[] nesterov, bool[] maximize, ".
// The suffix "[]" makes them lists.
template <typename Take>
std::string arguments_of(const std::string& suffix, const Take& take) {
  std::string arguments;
  for_each_hyperparameter([&](const std::string& name, auto member) {
    constexpr bool is_number = std::is_same_v<decltype(type_of(member)), double>;
    if (take(name)) arguments += (is_number ? "float" : "bool") + suffix + ' ' + name + ", ";
  });
  return arguments;
}

// The schema of a step op called `name`.
//
// Each list of hyperparameters has one entry for each group. The first group_sizes[0] parameters belong to
// group 0, the next group_sizes[1] to group 1, and so on. fused_lars/ops.h says which tensors the state lists
// hold. squared_norms replaces the norms that the op would take itself. Sharded parameters need that, since
// the norms are those of whole parameters. The op writes the trust ratios and norms that it used into
// trust_ratios and layer_norms.
//
// masters_follow says that someone may have written into parameters that have a master since the last step.
// Then masters take over the elements that they do not round to. A caller who knows that nobody has saves
// reading those parameters.
//
// workspace is scratch memory for the CUDA step, an int32 vector of any size. A caller who keeps it from step
// to step saves an allocation and a memset in each. It holds zeros before and after each step. If it does
// not, the kernel hangs or does nothing. The op cannot check that, since it would have to wait for the
// device. So the caller makes it with zeros, and only these ops write it, one at a time. If it is too small,
// the op sets it to larger memory. A traced program does not allow that, so there it has to be large enough
// or left out.
std::string step_schema(const std::string& name, const std::string& lr) {
  return name +
         "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, Tensor(c!)[] master_params, "
         "Tensor(d!)[] steps, Tensor(e!)[] momentum_scales, Tensor(f!)[] rng_states, int[] group_sizes, *, " +
         lr + " lr, " + arguments_of("[]", [](const std::string& name) { return name != "lr"; }) +
         "Tensor? squared_norms=None, Tensor? grad_scale=None, Tensor? found_inf=None, Tensor(g!)? "
         "trust_ratios=None, Tensor(h!)? layer_norms=None, Tensor(i!)? workspace=None, "
         "bool masters_follow=False) -> ()";
}

// The schema without "(a!)" and the like, which mark what an op writes.
std::string without_marks(std::string schema) {
  for (size_t mark; (mark = schema.find("!)")) != std::string::npos;) {
    const size_t begin = schema.rfind('(', mark);
    schema.erase(begin, mark + 2 - begin);
  }
  return schema;
}

// What is registered for a dispatch key runs one of these, after the checks.
using Backend = void (*)(Step&);
using NormBackend = at::Tensor (*)(NormCall&);

void bump_versions(const Step& step) {
  const auto bump = [](const at::Tensor& tensor) {
    if (tensor.defined() && !tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
  };
  for (const auto& tensor : step.tensors) {
    bump(tensor.param);
    bump(tensor.momentum_buffer);
    bump(tensor.master_param);
    bump(tensor.step);
    bump(tensor.momentum_scale);
    bump(tensor.rng_state);
  }
  bump(step.trust_ratios);
  bump(step.layer_norms);
}

// Autograd does not see into step_. It is off here, so that it cannot refuse a write when other tensors have
// been written already.
template <void (*kernel)(const Step&)>
void fused_backend(Step& step) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  fold_host_lr(step);
  bump_versions(step);
  run_dense(kernel, step);
}

// On an accelerator with fused kernels, nobody would notice that this build has none.
void warn_if_kernels_are_missing(const at::Tensor& param) {
  if (param.is_cuda()) {
    TORCH_WARN_ONCE(
        "this build of fused_lars has no CUDA kernels: tensors on ", param.device(),
        " are stepped by ordinary operators, which are slower. fused_lars.show_config() says what "
        "was built, docs/install.md how to build the kernels");
  }
}

void fallback_backend(Step& step) {
  warn_if_kernels_are_missing(step.tensors[0].param);
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  bump_versions(step);
  step_reference(step);
}

// Nothing is left to do after the checks: for check_step, and for step_ on meta tensors.
void check_only(Step&) {}

// For reference_step_, which autograd follows.
void reference_backend(Step& step) {
  check_autograd_allows(step);
  step_reference(step);
}

// AOTInductor of torch 2.14 passes None for an empty list.
std::vector<at::Tensor> tensors_of(const c10::IValue& list) {
  return list.isNone() ? std::vector<at::Tensor>() : list.toTensorVector();
}

void check_entries(const char* name, size_t entries, size_t groups) {
  FUSED_LARS_CHECK(entries == groups, InvalidOption, name, " has ", entries, " entries; expected ", groups,
                   ", one for each entry of group_sizes");
}

// A step op with one backend. It serves both overloads: lr is a list of numbers or of tensors.
template <Backend backend>
void step_op(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  const size_t count = op.schema().arguments().size();
  {
    const auto* argument = torch::jit::last(*stack, count).data();
    const auto params = tensors_of(*argument++), grads = tensors_of(*argument++),
               momentum_buffers = tensors_of(*argument++), master_params = tensors_of(*argument++),
               steps = tensors_of(*argument++), momentum_scales = tensors_of(*argument++),
               rng_states = tensors_of(*argument++);
    const auto group_sizes = (argument++)->toIntVector();
    Step step;
    step.groups.resize(group_sizes.size());
    for_each_hyperparameter([&](const char* name, auto member) {
      const auto values = (argument++)->toListRef();
      check_entries(name, values.size(), step.groups.size());
      for (size_t group = 0; group < values.size(); ++group) {
        if (values[group].isTensor()) {
          step.lr_tensors.push_back(values[group].toTensor());
        } else {
          step.groups[group].*member = values[group].to<decltype(type_of(member))>();
        }
      }
    });
    for (size_t group = 0; group < step.groups.size(); ++group) {
      validate(step.groups[group], static_cast<long>(group));
    }
    for (auto* tensor : {&step.squared_norms, &step.grad_scale, &step.found_inf, &step.trust_ratios,
                         &step.layer_norms, &step.workspace}) {
      const auto& value = *argument++;
      if (!value.isNone()) *tensor = value.toTensor();
    }
    step.masters_follow = (argument++)->toBool();
    check_and_assemble(
        {params, grads, momentum_buffers, master_params, steps, momentum_scales, rng_states, group_sizes},
        step);
    if (!step.tensors.empty()) backend(step);
  }
  torch::jit::drop(*stack, count);
}

at::Tensor squared_norms_of(NormBackend backend, at::TensorList params, at::TensorList grads,
                            at::IntArrayRef group_sizes, NormCall call) {
  check_and_assemble(params, grads, group_sizes, call);
  if (!params.empty()) return backend(call);
  const auto device = call.workspace.defined() ? call.workspace.device() : at::Device(at::kCPU);
  return at::empty({0, 2}, at::TensorOptions(device).dtype(norm_dtype(device)));
}

template <NormBackend backend>
at::Tensor squared_norms_op(at::TensorList params, at::TensorList grads) {
  NormCall call;
  call.groups.resize(1);
  return squared_norms_of(backend, params, grads, {static_cast<int64_t>(params.size())}, std::move(call));
}

template <NormBackend backend>
at::Tensor squared_norms_groups_op(at::TensorList params, at::TensorList grads, at::IntArrayRef group_sizes,
                                   at::ArrayRef<double> weight_decay, const c10::List<bool>& maximize,
                                   const c10::List<bool>& decayed_norm,
                                   const std::optional<at::Tensor>& grad_scale, const at::Tensor& workspace) {
  NormCall call;
  call.groups.resize(group_sizes.size());
  const auto set = [&](const char* name, auto member, const auto& values) {
    check_entries(name, values.size(), call.groups.size());
    for (size_t group = 0; group < call.groups.size(); ++group) call.groups[group].*member = values[group];
  };
  set("weight_decay", &Hyperparameters::weight_decay, weight_decay);
  set("maximize", &Hyperparameters::maximize, maximize);
  set("decayed_norm", &Hyperparameters::decayed_norm, decayed_norm);
  for (size_t group = 0; group < call.groups.size(); ++group) {
    validate(call.groups[group], static_cast<long>(group));
  }
  call.grad_scale = grad_scale.value_or(at::Tensor());
  call.workspace = workspace;
  return squared_norms_of(backend, params, grads, group_sizes, std::move(call));
}

template <NormKernel kernel>
at::Tensor fused_norm_backend(NormCall& call) {
  return run_dense(kernel, call);
}

at::Tensor fallback_norm_backend(NormCall& call) {
  warn_if_kernels_are_missing(call.params[0]);
  return squared_norms_reference(call);
}

at::Tensor meta_norm_backend(NormCall& call) {
  const auto& param = call.params[0];
  return at::empty({static_cast<int64_t>(call.params.size()), 2},
                   param.options().dtype(norm_dtype(param.device())));
}

// The op that checks the ranges of one group's hyperparameters.
void check_hyperparameters(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  const size_t count = op.schema().arguments().size();
  const auto* argument = torch::jit::last(*stack, count).data();
  Hyperparameters values;
  for_each_hyperparameter(
      [&](const char*, auto member) { values.*member = (argument++)->to<decltype(type_of(member))>(); });
  validate(values);
  torch::jit::drop(*stack, count);
}

// Pushes the arguments of a step op for the groups' hyperparameters: one list for each hyperparameter.
void push_hyperparameters(const std::vector<Hyperparameters>& groups, torch::jit::Stack& stack) {
  for_each_hyperparameter([&](const char*, auto member) {
    c10::List<decltype(type_of(member))> values;
    values.reserve(groups.size());
    for (const auto& group : groups) values.push_back(group.*member);
    stack.emplace_back(std::move(values));
  });
}

// TorchScript takes the mark in "Tensor(a!)[]" for a write to the list, not to the tensors in it. So it would
// merge reads of a parameter before and after a step, and fold a parameter that is frozen. Scripts therefore
// have operators of their own. These have no marks, and TorchScript assumes that they write whatever they can
// reach. A script finds them first because they are registered first. Python, and with it torch.compile and
// torch.export, looks for the dispatcher's operators first.
void register_for_scripts(const std::string& name, const std::string& overload, const std::string& lr) {
  const auto script = overload.empty() ? "script" : overload + "_script";
  torch::jit::registerOperator(torch::jit::Operator(
      without_marks(step_schema(c10::str("fused_lars::", name, '.', script), lr)),
      [full_name = "fused_lars::" + name, overload](torch::jit::Stack& stack) {
        c10::Dispatcher::singleton().findSchemaOrThrow(full_name.c_str(), overload.c_str()).callBoxed(stack);
      },
      c10::AliasAnalysisKind::CONSERVATIVE));
}

template <Backend backend>
void register_step(torch::Library& library, const std::string& name) {
  for (const auto& overload : {name, name + ".tensor_lr"}) {
    library.impl(overload.c_str(), torch::CppFunction::makeFromBoxedFunction<&step_op<backend>>());
  }
}

template <NormBackend backend>
void register_norms(torch::Library& library) {
  library.impl("squared_norms", squared_norms_op<backend>);
  library.impl("squared_norms.groups", squared_norms_groups_op<backend>);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fused_lars, library) {
  for (const std::string name : {"step_", "reference_step_"}) {
    register_for_scripts(name, "", "float[]");
    register_for_scripts(name, "tensor_lr", "Tensor[]");
    library.def(step_schema(name, "float[]").c_str(), {at::Tag::pt2_compliant_tag});
    library.def(step_schema(name + ".tensor_lr", "Tensor[]").c_str(), {at::Tag::pt2_compliant_tag});
  }
  // Checks what step_ checks, and throws what it throws. Takes the same arguments and writes none of them.
  for (const auto& [overload, lr] :
       {std::pair("check_step", "float[]"), std::pair("check_step.tensor_lr", "Tensor[]")}) {
    library.def(without_marks(step_schema(overload, lr)).c_str(), {at::Tag::pt2_compliant_tag});
  }
  // There are two overloads because Inductor cannot compile an op that gets None for an argument that it may
  // write. The second one takes what decayed_norm needs: the hyperparameters of the groups, and grad_scale.
  library.def("squared_norms(Tensor[] params, Tensor[] grads) -> Tensor", {at::Tag::pt2_compliant_tag});
  library.def(
      "squared_norms.groups(Tensor[] params, Tensor[] grads, int[] group_sizes, *, float[] weight_decay, "
      "bool[] maximize, bool[] decayed_norm, Tensor? grad_scale, Tensor(a!) workspace) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  // Between momentum and what an int8 buffer holds of it (rounding.h).
  library.def("encode_momentum(Tensor momentum) -> (Tensor codes, Tensor scale)");
  library.def("decode_momentum(Tensor codes, Tensor scale) -> Tensor");
  auto arguments = arguments_of("", [](const std::string&) { return true; });
  arguments.erase(arguments.size() - 2);  // the last comma
  library.def(("check_hyperparameters(" + arguments + ") -> ()").c_str(),
              torch::CppFunction::makeFromBoxedFunction<&check_hyperparameters>());
}

TORCH_LIBRARY_IMPL(fused_lars, CPU, library) {
  register_step<fused_backend<step_cpu>>(library, "step_");
  register_norms<fused_norm_backend<squared_norms_cpu>>(library);
}

#ifdef FUSED_LARS_WITH_CUDA
TORCH_LIBRARY_IMPL(fused_lars, CUDA, library) {
  register_step<fused_backend<step_cuda>>(library, "step_");
  register_norms<fused_norm_backend<squared_norms_cuda>>(library);
}
#endif

TORCH_LIBRARY_IMPL(fused_lars, Meta, library) {
  register_step<check_only>(library, "step_");
  register_norms<meta_norm_backend>(library);
}

// Any other device.
TORCH_LIBRARY_IMPL(fused_lars, CompositeExplicitAutograd, library) {
  register_step<fallback_backend>(library, "step_");
  library.impl("encode_momentum", [](const at::Tensor& momentum) {
    auto [codes, scale] = encode_momentum(momentum);
    return std::make_tuple(std::move(codes), std::move(scale));
  });
  library.impl("decode_momentum", decode_momentum);
  register_norms<fallback_norm_backend>(library);
}

// step_ returns nothing that autograd could follow. Without this registration the call would go through
// torch's fallback for operators without a derivative, which packs all arguments into a stack and unpacks
// them again.
TORCH_LIBRARY_IMPL(fused_lars, Autograd, library) {
  library.impl("step_", torch::CppFunction::makeFallthrough());
  library.impl("step_.tensor_lr", torch::CppFunction::makeFallthrough());
}

// Autograd follows the operators inside of reference_step_. check_step has none, and is the same on all
// devices.
TORCH_LIBRARY_IMPL(fused_lars, CompositeImplicitAutograd, library) {
  register_step<reference_backend>(library, "reference_step_");
  register_step<check_only>(library, "check_step");
}

// Dispatch modes and tensor subclasses written in Python see the step, and need not see that it was checked.
TORCH_LIBRARY_IMPL(fused_lars, Python, library) {
  library.impl("check_step", torch::CppFunction::makeFallthrough());
  library.impl("check_step.tensor_lr", torch::CppFunction::makeFallthrough());
}

void step_(const StepLists& lists, const std::vector<Hyperparameters>& groups, const StepOptions& options) {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("fused_lars::step_", "");
  torch::jit::Stack stack{lists.params, lists.grads,           lists.momentum_buffers, lists.master_params,
                          lists.steps,  lists.momentum_scales, lists.rng_states,       lists.group_sizes};
  push_hyperparameters(groups, stack);
  torch::jit::push(stack, options.squared_norms, options.grad_scale, options.found_inf, options.trust_ratios,
                   options.layer_norms, options.workspace, options.masters_follow);
  op.callBoxed(stack);
}

at::Tensor squared_norms(at::TensorList params, at::TensorList grads) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("fused_lars::squared_norms", "")
                             .typed<decltype(squared_norms_op<meta_norm_backend>)>();
  return op.call(params, grads);
}

}  // namespace fused_lars
