#include "fused_lars/lars.h"

#include <ATen/core/grad_mode.h>

#include <iomanip>
#include <limits>
#include <locale>
#include <sstream>
#include <unordered_set>

#include "checks.h"
#include "step.h"
#include "step_calls.h"

namespace fused_lars {
namespace {

constexpr int64_t kStateVersion = 2;

// A short text that is read as the same double: 0.0005, not 0.00050000000000000001. std::to_chars does not
// exist in the libstdc++ of older systems.
std::string shortest(double value) {
  for (int digits = 6;; ++digits) {
    std::stringstream text;
    text.imbue(std::locale::classic());
    text << std::setprecision(digits) << value;
    double read = 0.0;
    if (digits == std::numeric_limits<double>::max_digits10 || (text >> read && read == value)) {
      return text.str();
    }
  }
}

}  // namespace

Lars::Lars(double base_lr) { set_learning_rate(base_lr); }

Lars::Lars(const Lars& other)
    : torch::CustomClassHolder(other),
      LearningRate(other),
      StepOptimizer(other),
      hyperparameters_(other.hyperparameters_),
      momentum_buffers_(other.momentum_buffers_) {
  const at::NoGradGuard no_grad;
  for (auto& [id, buffer] : momentum_buffers_) buffer = buffer.clone();
}

Lars& Lars::operator=(const Lars& other) { return *this = Lars(other); }

void Lars::set(double Hyperparameters::* field, double value) {
  auto changed = hyperparameters_;
  changed.*field = value;
  validate(changed);
  hyperparameters_ = changed;
}

Lars& Lars::with_momentum(double momentum) {
  set(&Hyperparameters::momentum, momentum);
  return *this;
}

Lars& Lars::with_weight_decay(double weight_decay) {
  set(&Hyperparameters::weight_decay, weight_decay);
  return *this;
}

Lars& Lars::with_trust_coefficient(double trust_coefficient) {
  set(&Hyperparameters::trust_coefficient, trust_coefficient);
  return *this;
}

Lars& Lars::with_decayed_norm(bool decayed_norm) {
  hyperparameters_.decayed_norm = decayed_norm;
  return *this;
}

void Lars::set_learning_rate(double lr) { set(&Hyperparameters::lr, lr); }

void Lars::step(int64_t parameter_id, const at::Tensor& weights, const at::Tensor& grad) {
  step_all(parameter_id, weights, grad);
}

void Lars::step_graph_node(at::TensorList graph, int64_t node) {
  FUSED_LARS_CHECK(node >= 0 && node < static_cast<int64_t>(graph.size()), InvalidNode, "node ", node,
                   " is not in the graph; allowed: indices of its ", graph.size(), " leaves, from 0");
  const auto& leaf = graph[node];
  FUSED_LARS_CHECK(leaf.defined(), InvalidTensor, "node ", node, " of the graph is an undefined tensor");
  FUSED_LARS_CHECK(leaf.is_leaf(), InvalidTensor, "node ", node,
                   " of the graph is the result of an operation; expected a leaf tensor");
  if (!leaf.requires_grad()) return;
  const auto& grad = leaf.grad();
  FUSED_LARS_CHECK(grad.defined(), MissingGradient, "node ", node,
                   " of the graph requires grad and has no gradient; run backward first");
  step(node, leaf, grad);
}

void Lars::step_all(at::IntArrayRef ids, at::TensorList weights, at::TensorList grads) {
  FUSED_LARS_CHECK(ids.size() == weights.size() && ids.size() == grads.size(), InvalidOption,
                   "ids, weights and grads have ", ids.size(), ", ", weights.size(), " and ", grads.size(),
                   " entries; expected equally many");
  std::unordered_set<int64_t> distinct_ids;
  std::unordered_set<const void*> distinct_weights;
  for (size_t i = 0; i < ids.size(); ++i) {
    FUSED_LARS_CHECK(distinct_ids.insert(ids[i]).second, InvalidOption, "parameter id ", ids[i],
                     " comes more than once; expected distinct ids");
    FUSED_LARS_CHECK(weights[i].defined() && grads[i].defined(), InvalidTensor, "parameter ", ids[i],
                     " has undefined weights or gradient");
    FUSED_LARS_CHECK(distinct_weights.insert(weights[i].unsafeGetTensorImpl()).second, InvalidTensor,
                     "the weights of parameter ", ids[i],
                     " are another parameter's as well; expected distinct tensors");
    FUSED_LARS_CHECK(weights[i].sym_sizes().equals(grads[i].sym_sizes()), ShapeMismatch,
                     "the gradient of parameter ", ids[i], " has shape ", grads[i].sym_sizes(),
                     "; expected the shape of its weights, ", weights[i].sym_sizes());
  }

  const at::NoGradGuard no_grad;
  StepCalls calls({hyperparameters_});
  std::vector<ParamState> states(ids.size());
  for (size_t i = 0; i < ids.size(); ++i) {
    const auto kept = momentum_buffers_.find(ids[i]);
    if (kept != momentum_buffers_.end() && kept->second.sizes() == weights[i].sizes()) {
      states[i].momentum_buffer = kept->second.to(weights[i].device(), weights[i].scalar_type());
    }
    complete(states[i], weights[i], hyperparameters_);
    calls.add(/*group=*/0, weights[i], grads[i], states[i]);
  }
  calls.run(workspaces_);
  if (!needs_momentum_buffer(hyperparameters_)) return;
  for (size_t i = 0; i < ids.size(); ++i) momentum_buffers_[ids[i]] = std::move(states[i].momentum_buffer);
}

Lars::State Lars::state() const {
  std::vector<int64_t> ids;
  std::vector<at::Tensor> buffers;
  for (const auto& [id, buffer] : momentum_buffers_) {
    ids.push_back(id);
    buffers.push_back(buffer);
  }
  const auto& h = hyperparameters_;
  return {kStateVersion,
          {h.lr, h.momentum, h.weight_decay, h.trust_coefficient, h.decayed_norm ? 1.0 : 0.0},
          ids,
          buffers};
}

Lars Lars::from_state(const State& state) {
  const auto& [version, settings, ids, buffers] = state;
  FUSED_LARS_CHECK(version == 1 || version == kStateVersion, InvalidOption,
                   "the stored Lars has format version ", version, "; this library reads version ",
                   kStateVersion);
  // Version 1 had no decayed_norm.
  const size_t count = version == 1 ? 4 : 5;
  FUSED_LARS_CHECK(settings.size() == count && ids.size() == buffers.size(), InvalidOption,
                   "the stored Lars has ", settings.size(), " settings, ", ids.size(), " ids and ",
                   buffers.size(), " momentum buffers; expected ", count,
                   " settings and equally many ids and buffers");
  auto lars = std::move(Lars(settings[0])
                            .with_momentum(settings[1])
                            .with_weight_decay(settings[2])
                            .with_trust_coefficient(settings[3])
                            .with_decayed_norm(version != 1 && settings[4] != 0.0));
  // The buffers are copied because copy.deepcopy of a TorchScript object does not copy the state.
  const at::NoGradGuard no_grad;
  for (size_t i = 0; i < ids.size(); ++i) {
    const auto& buffer = buffers[i];
    FUSED_LARS_CHECK(
        buffer.defined() && buffer.layout() == at::kStrided && is_parameter_dtype(buffer.scalar_type()),
        InvalidTensor, "the stored momentum buffer of parameter ", ids[i], " is ",
        buffer.defined() ? c10::str(buffer.scalar_type(), " with layout ", buffer.layout()) : "undefined",
        "; allowed: Float, Double, Half, BFloat16 with layout Strided");
    FUSED_LARS_CHECK(lars.momentum_buffers_.emplace(ids[i], buffer.clone()).second, InvalidOption,
                     "the stored Lars has two momentum buffers for parameter id ", ids[i]);
  }
  return lars;
}

std::ostream& operator<<(std::ostream& out, const Lars& lars) {
  const auto& h = lars.hyperparameters_;
  return out << "Lars(lr=" << shortest(h.lr) << ", momentum=" << shortest(h.momentum)
             << ", weight_decay=" << shortest(h.weight_decay)
             << ", trust_coefficient=" << shortest(h.trust_coefficient)
             << (h.decayed_norm ? ", decayed_norm=True" : "") << ", states=" << lars.momentum_buffers_.size()
             << ')';
}

}  // namespace fused_lars
