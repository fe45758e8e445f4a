// train_packaged PACKAGE RUN OUT: trains with a whole training step that AOTInductor compiled. PACKAGE maps
// parameters, momentum buffers, a batch and lr to a loss, and updates the first two; RUN is a torch.save of
// (parameters, batches). The trained parameters are written to OUT.

#include <fstream>
#include <iostream>
#include <iterator>

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

int main(int argc, char** argv) {
  if (argc != 4) return 2;
  torch::inductor::AOTIModelPackageLoader training_step(argv[1]);
  std::ifstream file(argv[2], std::ios::binary);
  const auto run = torch::pickle_load({std::istreambuf_iterator<char>(file), {}});
  std::vector<torch::Tensor> params, tensors;
  for (const auto& param : run.toTupleRef().elements()[0].toListRef()) params.push_back(param.toTensor());
  tensors = params;
  for (const auto& param : params) tensors.push_back(torch::zeros_like(param));

  double lr = 2.0;
  for (const auto& batch : run.toTupleRef().elements()[1].toListRef()) {
    auto inputs = tensors;
    for (const auto& tensor : batch.toTupleRef().elements()) inputs.push_back(tensor.toTensor());
    inputs.push_back(torch::tensor(lr, torch::kDouble));
    std::cout << training_step.run(inputs).at(0).item<double>() << '\n';
    lr *= 0.5;
  }
  const auto out = torch::pickle_save(c10::IValue(params));
  std::ofstream(argv[3], std::ios::binary).write(out.data(), static_cast<std::streamsize>(out.size()));
}
