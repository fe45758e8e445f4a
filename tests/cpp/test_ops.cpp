// The ops by their C++ functions, and the rule of one parameter.

#include <limits>

#include <torch/torch.h>

#include "expected.h"
#include "fused_lars/errors.h"
#include "fused_lars/ops.h"
#include "rule.h"

namespace {

using fused_lars::Hyperparameters;
using fused_lars::StepOptions;

const expected::Settings settings{
    .lr = 0.5, .momentum = 0.9, .weight_decay = 0.01, .trust_coefficient = 0.02};
const Hyperparameters group{.lr = 0.5, .momentum = 0.9, .weight_decay = 0.01, .trust_coefficient = 0.02};

// A tensor that starts `offset` elements into its storage, where vector loads are not aligned.
torch::Tensor misaligned(const torch::Tensor& values, int64_t offset) {
  return torch::zeros({values.numel() + offset + 1}, values.options())
      .narrow(0, offset, values.numel())
      .view(values.sizes())
      .copy_(values);
}

double squared_norm(const torch::Tensor& tensor) {
  return tensor.to(torch::kDouble).square().sum().item<double>();
}

// Sizes around those of vectors and tiles, at every alignment: what AddressSanitizer should see.
TEST(Step, EverySizeAndAlignment) {
  std::vector<int64_t> sizes{4095, 4096, 4097, 8192, 12289};
  for (int64_t size = 0; size <= 67; ++size) sizes.push_back(size);
  for (const auto dtype : {torch::kFloat, torch::kDouble, torch::kHalf, torch::kBFloat16}) {
    std::vector<torch::Tensor> params, grads, buffers;
    std::vector<expected::Parameter> want;
    for (size_t i = 0; i < sizes.size(); ++i) {
      const int seed = static_cast<int>(i);
      params.push_back(misaligned(random_tensor({sizes[i]}, seed, dtype), seed % 5));
      grads.push_back(misaligned(random_tensor({sizes[i]}, seed + 1, dtype), seed % 3));
      buffers.push_back(misaligned(torch::zeros({sizes[i]}, dtype), seed % 7));
      want.emplace_back(params.back());
    }
    for (int step = 0; step < 2; ++step) {
      const std::vector<int64_t> sizes{static_cast<int64_t>(params.size())};
      fused_lars::step_({.params = params, .grads = grads, .momentum_buffers = buffers, .group_sizes = sizes},
                        {group});
      for (size_t i = 0; i < want.size(); ++i) want[i].step(settings, grads[i]);
    }
    for (size_t i = 0; i < want.size(); ++i)
      expect_close(params[i], want[i], c10::str(dtype, " of size ", sizes[i]));
  }
}

TEST(Step, BitsDoNotDependOnTheNumberOfThreads) {
  const int before = at::get_num_threads();
  std::vector<torch::Tensor> results;
  for (const int threads : {1, 2, 3}) {
    at::set_num_threads(threads);
    auto param = random_tensor({300, 1001}, 1), buffer = torch::zeros_like(param);
    const auto grad = random_tensor({300, 1001}, 2);
    fused_lars::step_({.params = {param}, .grads = {grad}, .momentum_buffers = {buffer}, .group_sizes = {1}},
                      {group});
    results.push_back(param);
  }
  at::set_num_threads(before);
  EXPECT_TRUE(same_bits(results[0], results[1]));
  EXPECT_TRUE(same_bits(results[0], results[2]));
}

TEST(Step, OptionsScaleSkipAndReport) {
  const auto start = random_tensor({40}, 1), grad = random_tensor({40}, 2);
  const auto step = [&](const torch::Tensor& gradient, const StepOptions& options) {
    auto param = start.clone(), buffer = torch::zeros_like(param);
    fused_lars::step_(
        {.params = {param}, .grads = {gradient}, .momentum_buffers = {buffer}, .group_sizes = {1}}, {group},
        options);
    return param;
  };
  const auto plain = step(grad, {});
  // A power of two scales without rounding.
  EXPECT_TRUE(same_bits(plain, step(grad * 4, {.grad_scale = torch::tensor(4.f)})));
  EXPECT_TRUE(same_bits(start, step(grad * NAN, {.found_inf = torch::tensor(2.f)})));
  EXPECT_TRUE(same_bits(plain, step(grad, {.found_inf = torch::tensor(0.f)})));
  EXPECT_TRUE(step(grad * NAN, {}).isnan().all().item<bool>());

  const auto ratios = torch::zeros({1}, torch::kDouble);
  step(grad, {.trust_ratios = ratios});
  const double norm = std::sqrt(squared_norm(start));
  EXPECT_NEAR(ratios.item<double>(), 0.02 * norm / (std::sqrt(squared_norm(grad)) + 0.01 * norm), 1e-8);

  // Norms that are given are taken, not computed.
  const auto given = torch::tensor({{4.0, 9.0}}, torch::kDouble);
  step(grad, {.squared_norms = given, .trust_ratios = ratios});
  EXPECT_NEAR(ratios.item<double>(), 0.02 * 2 / (3 + 0.01 * 2), 1e-15);
}

TEST(Step, GroupsMastersAndStepsGoWhereTheyBelong) {
  auto half = random_tensor({8}, 1, torch::kHalf), single = random_tensor({8}, 2),
       plain = random_tensor({8}, 3);
  auto master = half.to(torch::kFloat), half_buffer = torch::zeros({8}), single_buffer = torch::zeros({8});
  std::vector<torch::Tensor> steps{torch::zeros({}), torch::zeros({})};
  const Hyperparameters damped{
      .lr = 0.5, .momentum = 0.9, .dampening = 0.5, .classic_momentum = false, .master_weights = true};
  const expected::Settings damped_settings{
      .lr = 0.5, .momentum = 0.9, .dampening = 0.5, .classic_momentum = false};
  expected::Parameter want_half(half), want_single(single), want_plain(plain);
  for (int step = 0; step < 3; ++step) {
    const auto half_grad = random_tensor({8}, 10 + step, torch::kHalf), grad = random_tensor({8}, 20 + step);
    fused_lars::step_({.params = {half, single, plain},
                       .grads = {half_grad, grad, grad},
                       .momentum_buffers = {half_buffer, single_buffer},
                       .master_params = {master},
                       .steps = steps,
                       .group_sizes = {2, 0, 1}},
                      {damped, {}, {.lr = 0.1}});
    want_half.step(damped_settings, half_grad);
    want_single.step(damped_settings, grad);
    want_plain.step({.lr = 0.1}, grad);
  }
  expect_close(master, want_half);
  EXPECT_TRUE(same_bits(half, master.to(torch::kHalf)));
  expect_close(single, want_single);
  expect_close(plain, want_plain);
  EXPECT_EQ(steps[0].item<float>(), 3);
}

TEST(Step, FaultsAreNamedByListAndIndex) {
  auto a = torch::ones({2}), b = torch::ones({3});
  const auto grad = torch::ones({2}), buffer = torch::zeros({2});
  const auto step = [&](at::TensorList grads, at::TensorList buffers, std::vector<int64_t> sizes = {2},
                        std::vector<Hyperparameters> groups = {group}) {
    fused_lars::step_({.params = {a, b}, .grads = grads, .momentum_buffers = buffers, .group_sizes = sizes},
                      groups);
  };
  EXPECT_EQ(MESSAGE_OF(step({grad, grad}, {buffer, buffer}), fused_lars::ShapeMismatch),
            "grads[1] has shape [2]; expected the shape of its parameter, [3]");
  EXPECT_CONTAINS(MESSAGE_OF(step({grad}, {buffer, buffer}), fused_lars::InvalidTensor), "grads has 1");
  EXPECT_CONTAINS(MESSAGE_OF(step({grad, b}, {buffer}), fused_lars::InvalidTensor), "momentum_buffers has 1");
  EXPECT_CONTAINS(MESSAGE_OF(step({grad, b}, {buffer, buffer}), fused_lars::ShapeMismatch),
                  "momentum_buffers[1]");
  MESSAGE_OF(step({grad, b}, {buffer, b}, {1}), fused_lars::InvalidTensor);
  EXPECT_CONTAINS(
      MESSAGE_OF(step({grad, b}, {buffer, b}, {1, 1}, {group, {.lr = -1}}), fused_lars::InvalidLearningRate),
      "in group 1");
  EXPECT_TRUE(same_bits(a, torch::ones({2})));
}

TEST(Step, WhatIsWrittenNeedsMemoryOfItsOwn) {
  const auto all = random_tensor({24}, 1), before = all.clone();
  const auto part = [&](int64_t from, int64_t to) { return all.slice(0, from, to); };
  const auto own = [](int64_t size) { return random_tensor({size}, 2); };
  const auto message = [](at::TensorList params, at::TensorList grads, at::TensorList buffers,
                          const StepOptions& options = {}) {
    const auto size = static_cast<int64_t>(params.size());
    const fused_lars::StepLists lists{
        .params = params, .grads = grads, .momentum_buffers = buffers, .group_sizes = size};
    return MESSAGE_OF(fused_lars::step_(lists, {group}, options), fused_lars::InvalidTensor);
  };
  const auto shared = [](const char* later, const char* earlier) {
    return c10::str(later, " shares memory with ", earlier,
                    "; every tensor that a step writes needs memory of its own");
  };
  EXPECT_EQ(message({all, all}, {own(24), own(24)}, {own(24), own(24)}), shared("params[1]", "params[0]"));
  EXPECT_EQ(message({all, all.detach()}, {own(24), own(24)}, {own(24), own(24)}),
            shared("params[1]", "params[0]"));
  EXPECT_EQ(message({own(3), part(4, 8), part(0, 5)}, {own(3), own(4), own(5)}, {own(3), own(4), own(5)}),
            shared("params[2]", "params[1]"));
  EXPECT_EQ(message({part(0, 4)}, {own(4)}, {part(3, 7)}), shared("momentum_buffers[0]", "params[0]"));
  EXPECT_EQ(message({part(0, 4)}, {part(0, 4)}, {own(4)}), shared("grads[0]", "params[0]"));
  EXPECT_EQ(message({part(0, 4)}, {own(4)}, {own(4)}, {.grad_scale = part(2, 3)}),
            shared("grad_scale", "params[0]"));
  const auto ratios = torch::zeros({2}, torch::kDouble);
  EXPECT_EQ(message({own(2)}, {own(2)}, {own(2)},
                    {.squared_norms = ratios.view({1, 2}), .trust_ratios = ratios.slice(0, 1)}),
            shared("trust_ratios", "squared_norms"));
  EXPECT_TRUE(same_bits(all, before));

  // Neighbours do not, nor what is only read, nor tensors without elements.
  const auto grad = own(8);
  fused_lars::step_({.params = {part(0, 8), part(8, 16), part(3, 3)},
                     .grads = {grad, grad, part(3, 3)},
                     .momentum_buffers = {part(16, 24), own(8), part(3, 3)},
                     .group_sizes = {3}},
                    {group}, {.grad_scale = torch::ones({}), .found_inf = torch::zeros({})});
  EXPECT_FALSE(same_bits(all, before));
}

// A tensor that is not there is no tensor that is not needed.
TEST(Step, UndefinedTensorsAreNamed) {
  const std::vector<at::Tensor> none{at::Tensor()}, half{random_tensor({4}, 1, torch::kHalf)};
  const std::vector<at::Tensor> codes{torch::zeros({4}, torch::kChar)}, one{torch::ones({4})},
      count{torch::zeros({1})}, rng_state{torch::zeros({3}, torch::kLong)};
  const auto before = half[0].clone();
  const Hyperparameters all_state{
      .momentum = 0.9, .dampening = 0.5, .classic_momentum = false, .master_weights = true};
  const fused_lars::StepLists all{.params = half,
                                  .grads = one,
                                  .momentum_buffers = codes,
                                  .master_params = one,
                                  .steps = count,
                                  .momentum_scales = count,
                                  .rng_states = rng_state,
                                  .group_sizes = {}};
  const int64_t size = 1;
  const auto message = [&](at::TensorList fused_lars::StepLists::* list) {
    auto lists = all;
    lists.group_sizes = size;
    lists.*list = none;
    return MESSAGE_OF(fused_lars::step_(lists, {all_state}), fused_lars::InvalidTensor);
  };
  using Lists = fused_lars::StepLists;
  EXPECT_EQ(message(&Lists::params), "params[0] is undefined");
  EXPECT_EQ(message(&Lists::grads), "grads[0] is undefined");
  EXPECT_EQ(message(&Lists::momentum_buffers), "momentum_buffers[0] is undefined");
  EXPECT_EQ(message(&Lists::master_params), "master_params[0] is undefined");
  EXPECT_EQ(message(&Lists::steps), "steps[0] is undefined");
  EXPECT_EQ(message(&Lists::momentum_scales), "momentum_scales[0] is undefined");
  EXPECT_EQ(message(&Lists::rng_states), "rng_states[0] is undefined");
  EXPECT_TRUE(same_bits(half[0], before));
}

TEST(Step, AStepCountThatCannotBeWrittenIsFoundFirst) {
  const std::vector<at::Tensor> params{random_tensor({4}, 1), random_tensor({4}, 2)};
  const std::vector<at::Tensor> before{params[0].clone(), params[1].clone()};
  const std::vector<at::Tensor> grads{torch::ones({4}), torch::ones({4})};
  const std::vector<at::Tensor> buffers{torch::zeros({4}), torch::zeros({4})};
  const Hyperparameters damped{.momentum = 0.9, .dampening = 0.5, .classic_momentum = false};
  const std::vector<at::Tensor> steps{torch::zeros({1}), torch::zeros({1}).to_sparse()};
  const int64_t size = 2;
  const fused_lars::StepLists lists{
      .params = params, .grads = grads, .momentum_buffers = buffers, .steps = steps, .group_sizes = size};
  EXPECT_EQ(MESSAGE_OF(fused_lars::step_(lists, {damped}), fused_lars::InvalidTensor),
            "steps[1] has layout Sparse; allowed: Strided");
  EXPECT_TRUE(same_bits(params[0], before[0]) && same_bits(params[1], before[1]));
}

TEST(Step, WithoutParametersIsCheckedToo) {
  using fused_lars::StepLists;
  const auto buffer = torch::zeros({2});
  const int64_t zero = 0, one = 1;
  const StepLists empty{.params = {}, .grads = {}, .group_sizes = zero};
  StepLists with_buffer = empty, with_grad = empty, with_size = empty;
  with_buffer.momentum_buffers = buffer;
  with_grad.grads = buffer;
  with_size.group_sizes = one;
  fused_lars::step_({.params = {}, .grads = {}}, {});
  fused_lars::step_({.params = {}, .grads = {}, .group_sizes = {0, 0}}, {group, group},
                    {.trust_ratios = torch::zeros({0}, torch::kDouble)});
  EXPECT_CONTAINS(MESSAGE_OF(fused_lars::step_(with_buffer, {group}), fused_lars::InvalidTensor),
                  "momentum_buffers has 1 tensors; expected 0");
  MESSAGE_OF(fused_lars::step_(with_grad, {group}), fused_lars::InvalidTensor);
  MESSAGE_OF(fused_lars::step_(with_size, {group}), fused_lars::InvalidTensor);
  MESSAGE_OF(fused_lars::step_(empty, {{.lr = -1}}), fused_lars::InvalidLearningRate);
  MESSAGE_OF(fused_lars::step_({.params = {}, .grads = {}}, {group}), fused_lars::InvalidOption);
  MESSAGE_OF(fused_lars::step_(empty, {group}, {.squared_norms = buffer}), fused_lars::ShapeMismatch);
}

TEST(Step, SizesOfGroupsThatOverflowAreFound) {
  const std::vector<at::Tensor> params{torch::ones({2}), torch::ones({2})};
  const std::vector<at::Tensor> grads{torch::ones({2}), torch::ones({2})};
  const int64_t huge = std::numeric_limits<int64_t>::max();
  const std::vector<int64_t> sizes{huge, huge, 4};
  const fused_lars::StepLists lists{.params = params, .grads = grads, .group_sizes = sizes};
  EXPECT_CONTAINS(MESSAGE_OF(fused_lars::step_(lists, {{}, {}, {}}), fused_lars::InvalidTensor),
                  "sum to more than 2, the number of parameters");
  EXPECT_TRUE(same_bits(params[0], torch::ones({2})));
}

TEST(Step, ErrorsNameTheFileButNotWhereItWasBuilt) {
  try {
    fused_lars::step_({.params = {torch::ones({2})},
                       .grads = {torch::ones({3})},
                       .momentum_buffers = {torch::zeros({2})},
                       .group_sizes = {1}},
                      {group});
    FAIL();
  } catch (const fused_lars::ShapeMismatch& error) {
    EXPECT_CONTAINS(error.what(), " at csrc/checks.cpp:");
  }
}

// What a buffer in 8 bits and a weight in 16 become, beside those in fp32. Sizes are those of blocks, at
// every alignment: what AddressSanitizer should see.
TEST(Step, RoundedStateOfEverySizeAndAlignment) {
  std::vector<int64_t> sizes{127, 128, 129, 511, 512, 513, 4095, 4096, 4097, 12289};
  for (int64_t size = 0; size <= 67; ++size) sizes.push_back(size);
  std::vector<torch::Tensor> params, halves, grads, codes, scales, rng_states;
  std::vector<expected::Parameter> want;
  for (size_t i = 0; i < sizes.size(); ++i) {
    const int seed = static_cast<int>(i);
    params.push_back(misaligned(random_tensor({sizes[i]}, seed), seed % 5));
    halves.push_back(misaligned(random_tensor({sizes[i]}, seed, torch::kBFloat16), seed % 3));
    grads.push_back(misaligned(random_tensor({sizes[i]}, seed + 1), seed % 3));
    codes.push_back(misaligned(torch::zeros({sizes[i]}, torch::kChar), seed % 7));
    scales.push_back(torch::zeros({(sizes[i] + 127) / 128}));
    rng_states.push_back(torch::tensor({int64_t{1} << 32 | seed, int64_t{0}, int64_t{seed % 9}}));
    want.emplace_back(params.back());
  }
  const auto states_of_halves = [&] {
    std::vector<torch::Tensor> copies;
    for (const auto& rng_state : rng_states) copies.push_back(rng_state.clone());
    return copies;
  }();
  const std::vector<int64_t> group_sizes{static_cast<int64_t>(sizes.size())};
  fused_lars::step_({.params = params,
                     .grads = grads,
                     .momentum_buffers = codes,
                     .momentum_scales = scales,
                     .rng_states = rng_states,
                     .group_sizes = group_sizes},
                    {group});
  fused_lars::step_(
      {.params = halves, .grads = grads, .rng_states = states_of_halves, .group_sizes = group_sizes},
      {{.lr = 0.5, .trust_coefficient = 0.02, .stochastic_rounding = true}});
  for (size_t i = 0; i < sizes.size(); ++i) {
    want[i].step(settings, grads[i]);
    // The first update of a weight takes the momentum as it was before rounding.
    expect_close(params[i], want[i], c10::str("of size ", sizes[i]));
    EXPECT_TRUE(halves[i].isfinite().all().item<bool>());
    EXPECT_EQ(rng_states[i][1].item<int64_t>(), 1);
    EXPECT_EQ(states_of_halves[i][1].item<int64_t>(), 1);
  }
}

TEST(SquaredNorms, OfNoTensors) {
  const auto norms = fused_lars::squared_norms({}, {});
  EXPECT_EQ(norms.sizes(), (std::vector<int64_t>{0, 2}));
  EXPECT_EQ(norms.scalar_type(), torch::kDouble);
}

TEST(SquaredNorms, OfEveryDtypeInDouble) {
  std::vector<torch::Tensor> params, grads;
  for (const auto dtype : {torch::kFloat, torch::kDouble, torch::kHalf, torch::kBFloat16}) {
    params.push_back(random_tensor({70, 90}, 1, dtype));
    grads.push_back(random_tensor({70, 90}, 2, dtype) * 100);
  }
  params.push_back(torch::empty({0}));
  grads.push_back(torch::empty({0}));
  const auto norms = fused_lars::squared_norms(params, grads);
  EXPECT_EQ(norms.scalar_type(), torch::kDouble);
  for (int64_t i = 0; i < norms.size(0); ++i) {
    EXPECT_NEAR(norms[i][0].item<double>(), squared_norm(params[i]), 1e-5 * squared_norm(params[i])) << i;
    EXPECT_NEAR(norms[i][1].item<double>(), squared_norm(grads[i]), 1e-5 * squared_norm(grads[i])) << i;
  }
}

TEST(Rule, TrustRatioAtItsEdges) {
  using fused_lars::trust_ratio;
  const double nan = std::nan(""), infinity = std::numeric_limits<double>::infinity();
  const Hyperparameters h{.weight_decay = 0.5, .trust_coefficient = 0.1, .eps = 1};
  EXPECT_DOUBLE_EQ(trust_ratio(h, 1, 2, 3, 1), 0.1 * 2 / (3 + 0.5 * 2 + 1));
  EXPECT_DOUBLE_EQ(trust_ratio(h, 1, 2, 3, -3), 0.1 * 2 / (1 + 0.5 * 2 + 1));
  for (const double not_a_norm : {0.0, nan}) {
    EXPECT_EQ(trust_ratio(h, 1, not_a_norm, 3, 1), 1);
    EXPECT_EQ(trust_ratio(h, 1, 2, not_a_norm, 1), 1);
  }
  EXPECT_EQ(trust_ratio(h, 1, 2, infinity, 1), 0);
  auto off = h;
  off.layer_adaptation = false;
  EXPECT_EQ(trust_ratio(off, 1, 2, 3, 1), 1);

  auto clipped = h;
  clipped.trust_clip = true;  // q is 0.04 before
  EXPECT_DOUBLE_EQ(trust_ratio(clipped, 0.4, 2, 3, 1), 0.1);
  EXPECT_EQ(trust_ratio(clipped, 0.01, 2, 3, 1), 1);
  EXPECT_EQ(trust_ratio(clipped, 0, 2, 3, 1), 1);
}

}  // namespace
