// Trains a line with every interface of the package. Exits with 0 when all of them have learnt it.

#include <cmath>
#include <iostream>

#include <fused_lars/fused_lars.h>
#include <torch/torch.h>

int main() {
  torch::manual_seed(0);
  const auto inputs = torch::randn({256, 4}),
             targets = inputs.matmul(torch::tensor({{1.f}, {-2.f}, {3.f}, {0.5f}}));
  bool learnt = true;
  const auto report = [&](const char* name, double first, double last) {
    std::cout << name << ": loss " << first << " -> " << last << '\n';
    learnt = learnt && last < 0.01 * first;
  };

  torch::nn::Linear model(4, 1);
  fused_lars::LARS optimizer(model->parameters(),
                             fused_lars::LARSOptions(1.0).momentum(0.9).trust_coefficient(0.01));
  double first = NAN, last = NAN;
  for (int step = 0; step < 200; ++step) {
    const auto loss = torch::mse_loss(model->forward(inputs), targets);
    optimizer.zero_grad();
    loss.backward();
    optimizer.step();
    last = loss.item<double>();
    if (step == 0) first = last;
  }
  report("LARS", first, last);

  auto lars = fused_lars::Lars(1.0).with_momentum(0.9).with_trust_coefficient(0.01);
  auto weight = torch::randn({4, 1});
  for (int step = 0; step < 200; ++step) {
    const auto error = inputs.matmul(weight) - targets;
    last = error.square().mean().item<double>();
    if (step == 0) first = last;
    lars.step(0, weight, inputs.t().matmul(error) * (2.0 / 256));
  }
  report("Lars", first, last);
  std::cout << lars << '\n';

  try {
    lars.with_momentum(2.0);
    return 1;
  } catch (const fused_lars::InvalidMomentum& error) {
    std::cout << error.what_without_backtrace() << '\n';
  }
  return learnt ? 0 : 1;
}
