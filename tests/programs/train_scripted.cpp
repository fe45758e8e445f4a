// train_scripted MODULE BATCHES OUT: trains a scripted module that holds its own Lars, without Python.
// BATCHES is a torch.save of a list of (inputs, targets); the trained module is saved as OUT. Prints the
// optimizer.

#include <fstream>
#include <iostream>
#include <iterator>

#include <fused_lars/fused_lars.h>
#include <torch/script.h>
#include <torch/serialize.h>

int main(int argc, char** argv) {
  if (argc != 4) return 2;
  auto module = torch::jit::load(argv[1]);
  std::ifstream file(argv[2], std::ios::binary);
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  const auto batches = torch::pickle_load(bytes);
  for (const auto& batch : batches.toListRef()) {
    const auto& tensors = batch.toTupleRef().elements();
    module.run_method("train_step", tensors[0], tensors[1]);
  }
  std::cout << *module.attr("optimizer").toCustomClass<fused_lars::Lars>() << '\n';
  module.save(argv[3]);
}
