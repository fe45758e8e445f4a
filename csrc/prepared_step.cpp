// torch.classes.fused_lars.PreparedStep and PreparedNorms: the arguments of a step_ and of a squared_norms
// call, kept from one step to the next.
//
// Between two steps of a training run, only gradients and a few numbers change. Passing the other tensors
// from Python to C++ again would cost the host more time than all checks of the ops. Python decides whether
// the tensors are still the same. The ops check them in every step, as always.

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/custom_class.h>
#include <torch/library.h>

namespace fused_lars {
namespace {

using Tensors = c10::List<at::Tensor>;
using Numbers = c10::List<c10::List<double>>;
using Switches = c10::List<c10::List<bool>>;
using OptionalTensor = std::optional<at::Tensor>;

class PreparedNorms final : public torch::CustomClassHolder {
 public:
  PreparedNorms(Tensors params, c10::List<int64_t> group_sizes)
      : params_(std::move(params)), group_sizes_(std::move(group_sizes)) {}

  // Returns the norms, and keeps the gradients for the step until release().
  at::Tensor run_with(Tensors grads, c10::List<double> weight_decay, c10::List<bool> maximize,
                      c10::List<bool> decayed_norm, const OptionalTensor& grad_scale,
                      const at::Tensor& workspace) {
    grads_ = std::move(grads);
    static const auto op =
        c10::Dispatcher::singleton().findSchemaOrThrow("fused_lars::squared_norms", "groups");
    torch::jit::Stack stack{params_};
    torch::jit::push(stack, grads_, group_sizes_, std::move(weight_decay), std::move(maximize),
                     std::move(decayed_norm), grad_scale, workspace);
    op.callBoxed(stack);
    return stack.back().toTensor();
  }

  // The gradients of some rows: from runs[0] to before runs[1], from runs[2] to before runs[3], ...
  Tensors grads(const std::vector<int64_t>& runs) const {
    Tensors grads;
    grads.reserve(grads_.size());
    for (size_t run = 0; run + 1 < runs.size(); run += 2) {
      for (auto row = runs[run]; row < runs[run + 1]; ++row) grads.push_back(grads_.get(row));
    }
    return grads;
  }

  void release() { grads_ = Tensors(); }

 private:
  c10::IValue params_, group_sizes_;
  Tensors grads_;
};

class PreparedStep final : public torch::CustomClassHolder {
 public:
  // `without_grad`: the parameters that had no gradient, so that the step leaves them alone.
  PreparedStep(Tensors params, Tensors momentum_buffers, Tensors master_params, Tensors steps,
               Tensors momentum_scales, Tensors rng_states, std::vector<at::Tensor> without_grad,
               c10::List<int64_t> group_sizes)
      : params_(params.vec()),
        without_grad_(std::move(without_grad)),
        before_grads_{std::move(params)},
        after_grads_{std::move(momentum_buffers), std::move(master_params), std::move(steps),
                     std::move(momentum_scales),  std::move(rng_states),    std::move(group_sizes)} {}

  // One list for each hyperparameter, in the order of the op's schema, with one entry for each group.
  void set_hyperparameters(const Numbers& numbers, const Switches& switches) {
    hyperparameters_.clear();
    for (c10::List<double> values : numbers) hyperparameters_.emplace_back(std::move(values));
    for (c10::List<bool> values : switches) hyperparameters_.emplace_back(std::move(values));
  }

  // Makes a step with the .grad of each parameter. Returns false, and does nothing, if a parameter of the
  // call has no gradient or one of `without_grad` has one. Then the arguments must be prepared anew.
  bool run(const OptionalTensor& grad_scale, const OptionalTensor& found_inf,
           const OptionalTensor& trust_ratios, const OptionalTensor& layer_norms,
           const OptionalTensor& workspace) const {
    for (const auto& param : without_grad_) {
      if (param.grad().defined()) return false;
    }
    Tensors grads;
    grads.reserve(params_.size());
    for (const auto& param : params_) {
      const auto& grad = param.grad();
      if (!grad.defined()) return false;
      grads.push_back(grad);
    }
    run_with(std::move(grads), {}, grad_scale, found_inf, trust_ratios, layer_norms, workspace);
    return true;
  }

  // Makes a step with norms that were taken before, and with the gradients of some of their rows. The rows'
  // gradients cross from Python once: each time costs as much as a tensor's checks.
  void run_after(const c10::intrusive_ptr<PreparedNorms>& norms, const std::vector<int64_t>& runs,
                 const OptionalTensor& squared_norms, const OptionalTensor& grad_scale,
                 const OptionalTensor& found_inf, const OptionalTensor& trust_ratios,
                 const OptionalTensor& layer_norms, const OptionalTensor& workspace) const {
    run_with(norms->grads(runs), squared_norms, grad_scale, found_inf, trust_ratios, layer_norms, workspace);
  }

  // Makes a step with the given gradients and, optionally, with norms that were taken before.
  void run_with(Tensors grads, const OptionalTensor& squared_norms, const OptionalTensor& grad_scale,
                const OptionalTensor& found_inf, const OptionalTensor& trust_ratios,
                const OptionalTensor& layer_norms, const OptionalTensor& workspace) const {
    static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("fused_lars::step_", "");
    // The call is boxed because the lists are kept in the form that a stack holds.
    torch::jit::Stack stack(before_grads_);
    stack.reserve(op.schema().arguments().size());
    stack.emplace_back(std::move(grads));
    stack.insert(stack.end(), after_grads_.begin(), after_grads_.end());
    stack.insert(stack.end(), hyperparameters_.begin(), hyperparameters_.end());
    for (const auto* tensor :
         {&squared_norms, &grad_scale, &found_inf, &trust_ratios, &layer_norms, &workspace})
      stack.emplace_back(*tensor);
    stack.emplace_back(/*masters_follow=*/false);
    op.callBoxed(stack);
  }

 private:
  std::vector<at::Tensor> params_, without_grad_;
  // The arguments of the op, in the order of its schema.
  torch::jit::Stack before_grads_, after_grads_, hyperparameters_;
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(fused_lars, library) {
  library.class_<PreparedNorms>("PreparedNorms")
      .def(torch::init<Tensors, c10::List<int64_t>>())
      .def("run_with", &PreparedNorms::run_with)
      .def("release", &PreparedNorms::release);
  library.class_<PreparedStep>("PreparedStep")
      .def(torch::init<Tensors, Tensors, Tensors, Tensors, Tensors, Tensors, std::vector<at::Tensor>,
                       c10::List<int64_t>>())
      .def("set_hyperparameters", &PreparedStep::set_hyperparameters)
      .def("run", &PreparedStep::run)
      .def("run_after", &PreparedStep::run_after)
      .def("run_with", &PreparedStep::run_with);
}

}  // namespace fused_lars
