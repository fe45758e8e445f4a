// Trains the network of make_model.py in a process that has no Python:
//   train model.pt digits.pt trained.pt
// The last file is the network after training, with the optimizer's state: as good a model.pt as the first.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <iostream>
#include <iterator>

#include <fused_lars/fused_lars.h>
#include <torch/script.h>
#include <torch/torch.h>

namespace {

constexpr int kEpochs = 30, kBatchSize = 256, kTrainingImages = 1280;

c10::IValue load(const char* path) {
  std::ifstream file(path, std::ios::binary);
  TORCH_CHECK(file, "cannot open ", path);
  return torch::pickle_load({std::istreambuf_iterator<char>(file), {}});
}

double accuracy(torch::jit::Module& model, const at::Tensor& images, const at::Tensor& labels) {
  const torch::NoGradGuard no_grad;
  return (model.forward({images}).toTensor().argmax(1) == labels).to(torch::kDouble).mean().item<double>();
}

// A linear warm-up over a sixth of the steps, then a polynomial decay of power 2. It knows no more of an
// optimizer than that it has a learning rate.
void set_rate(fused_lars::LearningRate& optimizer, double base, int64_t step, int64_t steps) {
  const double rise = static_cast<double>(step + 1) / (steps / 6.0);
  const double left = (steps - step) / (steps * 5.0 / 6.0);
  optimizer.set_learning_rate(base * std::min(rise, std::pow(std::min(left, 1.0), 2)));
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) {
    std::cerr << "usage: " << argv[0] << " model.pt digits.pt trained.pt\n";
    return 2;
  }
  torch::manual_seed(0);
  auto model = torch::jit::load(argv[1]);
  const auto optimizer = model.attr("optimizer").toCustomClass<fused_lars::Lars>();
  const auto digits = load(argv[2]).toTuple();
  const auto order = torch::randperm(digits->elements()[0].toTensor().size(0));
  const auto images = digits->elements()[0].toTensor().index({order});
  const auto labels = digits->elements()[1].toTensor().index({order});
  const auto test_images = images.slice(0, kTrainingImages), test_labels = labels.slice(0, kTrainingImages);
  std::cout << *optimizer << '\n';

  const double base_rate = optimizer->learning_rate();
  const auto batches_per_epoch = (kTrainingImages + kBatchSize - 1) / kBatchSize;
  int64_t step = 0;
  for (int epoch = 1; epoch <= kEpochs; ++epoch) {
    double loss = 0;
    for (const auto& batch : torch::randperm(kTrainingImages).split(kBatchSize)) {
      set_rate(*optimizer, base_rate, step++, kEpochs * batches_per_epoch);
      const auto batch_loss = model.run_method("train_step", images.index({batch}), labels.index({batch}));
      loss += batch_loss.toTensor().item<double>() * batch.size(0) / kTrainingImages;
    }
    if (epoch % 5 == 0 || epoch == 1) {
      std::printf("epoch %2d  lr %.4f  loss %.4f  test accuracy %.1f %%\n", epoch, optimizer->learning_rate(),
                  loss, 100 * accuracy(model, test_images, test_labels));
    }
  }
  optimizer->set_learning_rate(base_rate);
  std::cout << *optimizer << '\n';
  model.save(argv[3]);
}
