// train_exported PACKAGE RUN OUT: trains with a loss and its gradients that AOTInductor compiled, and Lars.
// PACKAGE maps parameters and a batch to gradients and a loss; RUN is a torch.save of (parameters, batches).
// The trained parameters are written to OUT.

#include <fstream>
#include <iostream>
#include <iterator>
#include <numeric>

#include <fused_lars/fused_lars.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

int main(int argc, char** argv) {
  if (argc != 4) return 2;
  torch::inductor::AOTIModelPackageLoader loss_and_gradients(argv[1]);
  std::ifstream file(argv[2], std::ios::binary);
  const auto run = torch::pickle_load({std::istreambuf_iterator<char>(file), {}});
  std::vector<torch::Tensor> params;
  for (const auto& param : run.toTupleRef().elements()[0].toListRef()) params.push_back(param.toTensor());

  auto optimizer =
      fused_lars::Lars(2.0).with_momentum(0.9).with_weight_decay(1e-3).with_trust_coefficient(0.02);
  std::vector<int64_t> ids(params.size());
  std::iota(ids.begin(), ids.end(), 0);
  for (const auto& batch : run.toTupleRef().elements()[1].toListRef()) {
    auto inputs = params;
    for (const auto& tensor : batch.toTupleRef().elements()) inputs.push_back(tensor.toTensor());
    auto outputs = loss_and_gradients.run(inputs);
    std::cout << outputs.back().item<double>() << '\n';
    outputs.pop_back();
    optimizer.step_all(ids, params, outputs);
  }
  const auto out = torch::pickle_save(c10::IValue(params));
  std::ofstream(argv[3], std::ios::binary).write(out.data(), static_cast<std::streamsize>(out.size()));
}
