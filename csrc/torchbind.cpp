// Lars as torch.classes.fused_lars.Lars.

#include <torch/custom_class.h>
#include <torch/library.h>

#include <sstream>

#include "fused_lars/lars.h"

namespace fused_lars {
namespace {

using Self = c10::intrusive_ptr<Lars>;

template <Lars& (Lars::*builder)(double)>
Self build(const Self& self, double value) {
  (self.get()->*builder)(value);
  return self;
}

std::string to_string(const Self& self) {
  std::ostringstream text;
  text << *self;
  return text.str();
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fused_lars, library) {
  library.class_<Lars>("Lars")
      .def(torch::init<double>(), "", {torch::arg("base_lr")})
      .def("with_momentum", build<&Lars::with_momentum>, "", {torch::arg("momentum")})
      .def("with_weight_decay", build<&Lars::with_weight_decay>, "", {torch::arg("weight_decay")})
      .def("with_trust_coefficient", build<&Lars::with_trust_coefficient>, "",
           {torch::arg("trust_coefficient")})
      .def("with_decayed_norm",
           [](const Self& self, bool decayed_norm) {
             self->with_decayed_norm(decayed_norm);
             return self;
           },
           "", {torch::arg("decayed_norm")})
      .def("learning_rate", [](const Self& self) { return self->learning_rate(); })
      .def("set_learning_rate", [](const Self& self, double lr) { self->set_learning_rate(lr); }, "",
           {torch::arg("lr")})
      .def("clear_state", [](const Self& self) { self->clear_state(); })
      .def("step",
           [](const Self& self, int64_t parameter_id, const at::Tensor& weights, const at::Tensor& grad) {
             self->step(parameter_id, weights, grad);
           },
           "", {torch::arg("parameter_id"), torch::arg("weights"), torch::arg("grad")})
      .def("step_graph_node",
           [](const Self& self, const std::vector<at::Tensor>& graph, int64_t node) {
             self->step_graph_node(graph, node);
           },
           "", {torch::arg("graph"), torch::arg("node")})
      .def("step_all",
           [](const Self& self, const std::vector<int64_t>& ids, const std::vector<at::Tensor>& weights,
              const std::vector<at::Tensor>& grads) { self->step_all(ids, weights, grads); },
           "", {torch::arg("ids"), torch::arg("weights"), torch::arg("grads")})
      .def("__repr__", to_string)
      .def("__str__", to_string)
      .def_pickle(
          [](const Self& self) { return self->state(); },
          [](const Lars::State& state) { return c10::make_intrusive<Lars>(Lars::from_state(state)); });
}

}  // namespace fused_lars
