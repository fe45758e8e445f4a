// train_lars RUN OUT: steps fused_lars::LARS as RUN says and writes the parameters to OUT, for comparison
// with Python. RUN is a torch.save of (groups, steps): groups is a list of (options, parameters), options a
// dict from name to number, with momentum_dtype by name; each of the steps is a list of gradients of all
// parameters in order.

#include <fstream>
#include <iterator>
#include <string>

#include <fused_lars/fused_lars.h>
#include <torch/torch.h>

namespace {

at::ScalarType dtype_of(const std::string& name) {
  if (name == "int8") return at::kChar;
  if (name == "bfloat16") return at::kBFloat16;
  if (name == "float16") return at::kHalf;
  TORCH_CHECK(name == "float32", "unknown dtype ", name);
  return at::kFloat;
}

fused_lars::LARSOptions options_of(const c10::impl::GenericDict& values) {
  fused_lars::LARSOptions options;
  for (const auto& item : values) {
    const auto& name = item.key().toStringRef();
    if (name == "momentum_dtype") {
      options.momentum_dtype(dtype_of(item.value().toStringRef()));
      continue;
    }
    const double value = item.value().toScalar().toDouble();
    if (name == "lr")
      options.lr(value);
    else if (name == "momentum")
      options.momentum(value);
    else if (name == "weight_decay")
      options.weight_decay(value);
    else if (name == "trust_coefficient")
      options.trust_coefficient(value);
    else if (name == "eps")
      options.eps(value);
    else if (name == "dampening")
      options.dampening(value);
    else if (name == "nesterov")
      options.nesterov(value);
    else if (name == "maximize")
      options.maximize(value);
    else if (name == "trust_clip")
      options.trust_clip(value);
    else if (name == "layer_adaptation")
      options.layer_adaptation(value);
    else if (name == "decayed_norm")
      options.decayed_norm(value);
    else if (name == "classic_momentum")
      options.classic_momentum(value);
    else if (name == "master_weights")
      options.master_weights(value);
    else if (name == "stochastic_rounding")
      options.stochastic_rounding(value);
    else if (name == "rounding_seed")
      options.rounding_seed(static_cast<int64_t>(value));
    else
      TORCH_CHECK(false, "unknown option ", name);
  }
  return options;
}

std::vector<torch::Tensor> tensors_of(const c10::IValue& list) {
  std::vector<torch::Tensor> tensors;
  for (const auto& tensor : list.toListRef()) tensors.push_back(tensor.toTensor());
  return tensors;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  std::ifstream file(argv[1], std::ios::binary);
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  const auto run = torch::pickle_load(bytes);
  const auto& groups = run.toTupleRef().elements()[0];
  const auto& steps = run.toTupleRef().elements()[1];

  std::vector<torch::Tensor> params;
  std::vector<torch::optim::OptimizerParamGroup> param_groups;
  for (const auto& group : groups.toListRef()) {
    const auto& elements = group.toTupleRef().elements();
    const auto group_params = tensors_of(elements[1]);
    params.insert(params.end(), group_params.begin(), group_params.end());
    param_groups.emplace_back(
        group_params, std::make_unique<fused_lars::LARSOptions>(options_of(elements[0].toGenericDict())));
  }
  fused_lars::LARS optimizer(param_groups);
  for (const auto& step : steps.toListRef()) {
    const auto grads = tensors_of(step);
    for (size_t i = 0; i < params.size(); ++i) params[i].mutable_grad() = grads[i];
    optimizer.step();
  }

  const auto out = torch::pickle_save(c10::IValue(params));
  std::ofstream(argv[2], std::ios::binary).write(out.data(), static_cast<std::streamsize>(out.size()));
}
