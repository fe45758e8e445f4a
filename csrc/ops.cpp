// The schemas of torch.ops.fused_lars and their registration for each dispatch key.

#include "fused_lars/ops.h"

#include <type_traits>

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/jit/runtime/operator.h>
#include <torch/library.h>

#include "checks.h"
#include "dense.h"
#include "fused_lars/errors.h"
#include "step.h"

namespace fused_lars {
namespace {

// The step's arguments, for the op called `name`. Lists of hyperparameters have an entry for each group;
// group_sizes[i] of the parameters, in order, belong to group i. What the state lists hold is said in
// fused_lars/ops.h. squared_norms replaces the norms that the op would take itself, as sharded parameters
// need.
//
// workspace is scratch of any size that a caller who keeps it spares the CUDA step an allocation and a
// memset. It is zeros on entry and on return. Counters in it that are not zero make the CUDA step hang or do
// nothing; its values cannot be checked without waiting for the device, so it must be made of zeros and
// written by these ops only, one at a time. Where it is too small it is set to larger memory, which a traced
// program does not allow: there it is large enough or left out.
std::string step_schema(const std::string& name, const std::string& lr) {
  return name +
         "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, Tensor(c!)[] master_params, "
         "Tensor(d!)[] steps, int[] group_sizes, *, " +
         lr +
         " lr, float[] momentum, float[] weight_decay, float[] trust_coefficient, float[] eps, float[] "
         "dampening, bool[] nesterov, bool[] maximize, bool[] trust_clip, bool[] layer_adaptation, bool[] "
         "classic_momentum, bool[] master_weights, Tensor? squared_norms=None, Tensor? grad_scale=None, "
         "Tensor? found_inf=None, Tensor(e!)? trust_ratios=None, Tensor(f!)? workspace=None) -> ()";
}

// Its first arguments are lists of tensors.
constexpr size_t kStepLists = 5;

// A backend of the dispatcher: runs a checked step.
using Backend = void (*)(Step&);

void bump_versions(const Step& step) {
  const auto bump = [](const at::Tensor& tensor) {
    if (tensor.defined() && !tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
  };
  for (const auto& tensor : step.tensors) {
    bump(tensor.param);
    bump(tensor.momentum_buffer);
    bump(tensor.master_param);
    bump(tensor.step);
  }
  bump(step.trust_ratios);
}

// The backends of step_ are opaque to autograd, which must not object when some tensors are written already.
template <void (*kernel)(const Step&)>
void fused_backend(Step& step) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  fold_host_lr(step);
  bump_versions(step);
  run_dense(kernel, step);
}

void fallback_backend(Step& step) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  bump_versions(step);
  step_reference(step);
}

void meta_backend(Step&) {}

// Of reference_step_, which autograd sees through.
void reference_backend(Step& step) {
  check_autograd_allows(step);
  step_reference(step);
}

// The op itself, for a backend and for lr as numbers (at::ArrayRef<double>) or as tensors (at::TensorList).
template <Backend backend, typename LearningRates>
void step_op(at::TensorList params, at::TensorList grads, at::TensorList momentum_buffers,
             at::TensorList master_params, at::TensorList steps, at::IntArrayRef group_sizes,
             LearningRates lr, at::ArrayRef<double> momentum, at::ArrayRef<double> weight_decay,
             at::ArrayRef<double> trust_coefficient, at::ArrayRef<double> eps, at::ArrayRef<double> dampening,
             const c10::List<bool>& nesterov, const c10::List<bool>& maximize,
             const c10::List<bool>& trust_clip, const c10::List<bool>& layer_adaptation,
             const c10::List<bool>& classic_momentum, const c10::List<bool>& master_weights,
             const std::optional<at::Tensor>& squared_norms, const std::optional<at::Tensor>& grad_scale,
             const std::optional<at::Tensor>& found_inf, const std::optional<at::Tensor>& trust_ratios,
             const std::optional<at::Tensor>& workspace) {
  constexpr bool lr_is_tensor = std::is_same_v<LearningRates, at::TensorList>;
  Step step;
  const size_t groups = group_sizes.size();
  const auto has_group_entries = [groups](const char* name, size_t size) {
    FUSED_LARS_CHECK(size == groups, InvalidOption, name, " has ", size, " entries; expected ", groups,
                     ", one for each entry of group_sizes");
  };
  has_group_entries("lr", lr.size());
  has_group_entries("momentum", momentum.size());
  has_group_entries("weight_decay", weight_decay.size());
  has_group_entries("trust_coefficient", trust_coefficient.size());
  has_group_entries("eps", eps.size());
  has_group_entries("dampening", dampening.size());
  has_group_entries("nesterov", nesterov.size());
  has_group_entries("maximize", maximize.size());
  has_group_entries("trust_clip", trust_clip.size());
  has_group_entries("layer_adaptation", layer_adaptation.size());
  has_group_entries("classic_momentum", classic_momentum.size());
  has_group_entries("master_weights", master_weights.size());
  step.groups.reserve(groups);
  for (size_t i = 0; i < groups; ++i) {
    Hyperparameters group{.momentum = momentum[i],
                          .weight_decay = weight_decay[i],
                          .trust_coefficient = trust_coefficient[i],
                          .eps = eps[i],
                          .dampening = dampening[i],
                          .nesterov = nesterov.get(i),
                          .maximize = maximize.get(i),
                          .trust_clip = trust_clip.get(i),
                          .layer_adaptation = layer_adaptation.get(i),
                          .classic_momentum = classic_momentum.get(i),
                          .master_weights = master_weights.get(i)};
    if constexpr (!lr_is_tensor) group.lr = lr[i];
    validate(group, static_cast<long>(i));
    step.groups.push_back(group);
  }
  if constexpr (lr_is_tensor) step.lr_tensors = lr.vec();
  step.squared_norms = squared_norms.value_or(at::Tensor());
  step.grad_scale = grad_scale.value_or(at::Tensor());
  step.found_inf = found_inf.value_or(at::Tensor());
  step.trust_ratios = trust_ratios.value_or(at::Tensor());
  step.workspace = workspace.value_or(at::Tensor());
  check_and_assemble({params, grads, momentum_buffers, master_params, steps, group_sizes}, step);
  if (!step.tensors.empty()) backend(step);
}

// The same for arguments in a stack. AOTInductor of torch 2.14 passes None for an empty list of tensors.
template <Backend backend, typename LearningRates>
void boxed_step_op(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  static const auto kernel =
      c10::KernelFunction::makeFromUnboxedFunction(TORCH_FN((step_op<backend, LearningRates>)));
  const size_t arguments = op.schema().arguments().size();
  for (size_t i = 0; i < kStepLists; ++i) {
    auto& list = torch::jit::peek(*stack, i, arguments);
    if (list.isNone()) list = c10::List<at::Tensor>();
  }
  kernel.callBoxed(op, keys, stack);
}

// The norms op, for a backend that is given checked arguments; `workspace` may be undefined.
template <NormBackend backend>
at::Tensor squared_norms_workspace_op(at::TensorList params, at::TensorList grads,
                                      const at::Tensor& workspace) {
  check_norm_arguments(params, grads, workspace);
  if (params.empty()) {
    const auto device = workspace.defined() ? workspace.device() : at::Device(at::kCPU);
    return at::empty({0, 2}, at::TensorOptions(device).dtype(norm_dtype(device)));
  }
  return backend(params, grads, workspace);
}

template <NormBackend backend>
at::Tensor squared_norms_op(at::TensorList params, at::TensorList grads) {
  return squared_norms_workspace_op<backend>(params, grads, {});
}

template <NormBackend kernel>
at::Tensor fused_norm_backend(at::TensorList params, at::TensorList grads, const at::Tensor& workspace) {
  return run_dense(kernel, params, grads, workspace);
}

at::Tensor meta_norm_backend(at::TensorList params, at::TensorList, const at::Tensor&) {
  const auto count = static_cast<int64_t>(params.size());
  return at::empty({count, 2}, params[0].options().dtype(norm_dtype(params[0].device())));
}

void check_hyperparameters(double lr, double momentum, double weight_decay, double trust_coefficient,
                           double eps, double dampening, bool nesterov, bool classic_momentum) {
  validate({.lr = lr,
            .momentum = momentum,
            .weight_decay = weight_decay,
            .trust_coefficient = trust_coefficient,
            .eps = eps,
            .dampening = dampening,
            .nesterov = nesterov,
            .classic_momentum = classic_momentum});
}

// TorchScript takes "Tensor(a!)[]" for a write to the list, not to the tensors in it. It would merge reads of
// a parameter before and after a step, and freeze the parameter. So scripts have operators of their own,
// without such marks, which are taken to write whatever they can reach. Scripts find them because they are
// registered first; Python, and with it torch.compile and torch.export, finds the dispatcher's first.
void register_for_scripts(const std::string& name, const std::string& overload, const std::string& lr) {
  const auto script = overload.empty() ? "script" : overload + "_script";
  auto schema = step_schema(c10::str("fused_lars::", name, '.', script), lr);
  for (size_t mark; (mark = schema.find("!)")) != std::string::npos;) {
    const size_t begin = schema.rfind('(', mark);
    schema.erase(begin, mark + 2 - begin);
  }
  torch::jit::registerOperator(torch::jit::Operator(
      std::move(schema),
      [full_name = "fused_lars::" + name, overload](torch::jit::Stack& stack) {
        c10::Dispatcher::singleton().findSchemaOrThrow(full_name.c_str(), overload.c_str()).callBoxed(stack);
      },
      c10::AliasAnalysisKind::CONSERVATIVE));
}

template <Backend backend>
void register_step(torch::Library& library, const std::string& name) {
  library.impl(name.c_str(), step_op<backend, at::ArrayRef<double>>);
  library.impl((name + ".tensor_lr").c_str(), step_op<backend, at::TensorList>);
}

template <Backend backend>
void register_boxed_step(torch::Library& library, const std::string& name) {
  library.impl(name.c_str(),
               torch::CppFunction::makeFromBoxedFunction<&boxed_step_op<backend, at::ArrayRef<double>>>());
  library.impl((name + ".tensor_lr").c_str(),
               torch::CppFunction::makeFromBoxedFunction<&boxed_step_op<backend, at::TensorList>>());
}

template <NormBackend backend>
void register_norms(torch::Library& library) {
  library.impl("squared_norms", squared_norms_op<backend>);
  library.impl("squared_norms.workspace", squared_norms_workspace_op<backend>);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fused_lars, library) {
  for (const std::string name : {"step_", "reference_step_"}) {
    register_for_scripts(name, "", "float[]");
    register_for_scripts(name, "tensor_lr", "Tensor[]");
    library.def(step_schema(name, "float[]").c_str(), {at::Tag::pt2_compliant_tag});
    library.def(step_schema(name + ".tensor_lr", "Tensor[]").c_str(), {at::Tag::pt2_compliant_tag});
  }
  // Two overloads, since Inductor has no code for an op that may write to an argument and is given None for
  // it.
  library.def("squared_norms(Tensor[] params, Tensor[] grads) -> Tensor", {at::Tag::pt2_compliant_tag});
  library.def("squared_norms.workspace(Tensor[] params, Tensor[] grads, *, Tensor(a!) workspace) -> Tensor",
              {at::Tag::pt2_compliant_tag});
  library.def(
      "check_hyperparameters(float lr, float momentum, float weight_decay, float trust_coefficient, float "
      "eps, "
      "float dampening, bool nesterov, bool classic_momentum) -> ()",
      check_hyperparameters);
}

TORCH_LIBRARY_IMPL(fused_lars, CPU, library) {
  register_boxed_step<fused_backend<step_cpu>>(library, "step_");
  register_norms<fused_norm_backend<squared_norms_cpu>>(library);
}

#ifdef FUSED_LARS_WITH_CUDA
TORCH_LIBRARY_IMPL(fused_lars, CUDA, library) {
  register_boxed_step<fused_backend<step_cuda>>(library, "step_");
  register_norms<fused_norm_backend<squared_norms_cuda>>(library);
}
#endif

TORCH_LIBRARY_IMPL(fused_lars, Meta, library) {
  register_step<meta_backend>(library, "step_");
  register_norms<meta_norm_backend>(library);
}

// Any other device.
TORCH_LIBRARY_IMPL(fused_lars, CompositeExplicitAutograd, library) {
  register_boxed_step<fallback_backend>(library, "step_");
  register_norms<squared_norms_reference>(library);
}

// step_ returns nothing that autograd could follow. Without this, torch's fallback for operators that have no
// derivative packs all arguments into a stack and unpacks them again.
TORCH_LIBRARY_IMPL(fused_lars, Autograd, library) {
  library.impl("step_", torch::CppFunction::makeFallthrough());
  library.impl("step_.tensor_lr", torch::CppFunction::makeFallthrough());
}

// The reference by its own name, which autograd sees through.
TORCH_LIBRARY_IMPL(fused_lars, CompositeImplicitAutograd, library) {
  register_step<reference_backend>(library, "reference_step_");
}

void step_(at::TensorList params, at::TensorList grads, at::TensorList momentum_buffers,
           at::TensorList master_params, at::TensorList steps, at::IntArrayRef group_sizes,
           const std::vector<Hyperparameters>& groups, const StepOptions& options) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("fused_lars::step_", "")
                             .typed<decltype(step_op<meta_backend, at::ArrayRef<double>>)>();
  std::vector<double> lr, momentum, weight_decay, trust_coefficient, eps, dampening;
  c10::List<bool> nesterov, maximize, trust_clip, layer_adaptation, classic_momentum, master_weights;
  for (const auto& group : groups) {
    lr.push_back(group.lr);
    momentum.push_back(group.momentum);
    weight_decay.push_back(group.weight_decay);
    trust_coefficient.push_back(group.trust_coefficient);
    eps.push_back(group.eps);
    dampening.push_back(group.dampening);
    nesterov.push_back(group.nesterov);
    maximize.push_back(group.maximize);
    trust_clip.push_back(group.trust_clip);
    layer_adaptation.push_back(group.layer_adaptation);
    classic_momentum.push_back(group.classic_momentum);
    master_weights.push_back(group.master_weights);
  }
  op.call(params, grads, momentum_buffers, master_params, steps, group_sizes, lr, momentum, weight_decay,
          trust_coefficient, eps, dampening, nesterov, maximize, trust_clip, layer_adaptation,
          classic_momentum, master_weights, options.squared_norms, options.grad_scale, options.found_inf,
          options.trust_ratios, options.workspace);
}

at::Tensor squared_norms(at::TensorList params, at::TensorList grads) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("fused_lars::squared_norms", "")
                             .typed<decltype(squared_norms_op<meta_norm_backend>)>();
  return op.call(params, grads);
}

}  // namespace fused_lars
