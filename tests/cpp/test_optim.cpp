// fused_lars::LARS, the optimizer of the C++ front end.

#include <ATen/record_function.h>
#include <torch/torch.h>

#include <initializer_list>
#include <optional>
#include <sstream>

#include "expected.h"
#include "fused_lars/optim.h"

namespace {

using fused_lars::LARS;
using fused_lars::LARSOptions;
using fused_lars::LARSParamState;
using torch::optim::OptimizerParamGroup;

torch::Tensor leaf(std::vector<int64_t> shape, int seed, torch::Dtype dtype = torch::kFloat) {
  return random_tensor(std::move(shape), seed, dtype).requires_grad_();
}

OptimizerParamGroup group(std::vector<torch::Tensor> params, const LARSOptions& options) {
  return {std::move(params), std::make_unique<LARSOptions>(options)};
}

LARSOptions& options_of(torch::optim::Optimizer& optimizer, size_t index) {
  return static_cast<LARSOptions&>(optimizer.param_groups()[index].options());
}

void set_grads(const std::vector<torch::Tensor>& params, int seed) {
  for (const auto& param : params) {
    param.mutable_grad() = random_tensor(param.sizes().vec(), seed++, param.scalar_type());
  }
}

std::vector<torch::Tensor> detached(const std::vector<torch::Tensor>& params) {
  std::vector<torch::Tensor> result;
  for (const auto& param : params) result.push_back(param.detach().clone());
  return result;
}

void expect_same_bits(const std::vector<torch::Tensor>& a, const std::vector<torch::Tensor>& b) {
  ASSERT_EQ(a.size(), b.size());
  for (size_t i = 0; i < a.size(); ++i) EXPECT_TRUE(same_bits(a[i].detach(), b[i].detach())) << i;
}

LARSParamState& state_of(torch::optim::Optimizer& optimizer, const torch::Tensor& param) {
  return static_cast<LARSParamState&>(*optimizer.state().at(param.unsafeGetTensorImpl()));
}

struct Case {
  const char* name;
  LARSOptions options;
  expected::Settings settings;
};

class Options : public testing::TestWithParam<Case> {};

TEST_P(Options, FollowTheRule) {
  for (const auto dtype : {torch::kFloat, torch::kDouble, torch::kBFloat16}) {
    std::vector<torch::Tensor> params{leaf({7, 9}, 1, dtype), leaf({4100}, 2, dtype), leaf({}, 3, dtype)};
    std::vector<expected::Parameter> want(params.begin(), params.end());
    LARS optimizer(params, GetParam().options);
    for (int step = 0; step < 4; ++step) {
      set_grads(params, 10 * (step + 1));
      for (size_t i = 0; i < params.size(); ++i) want[i].step(GetParam().settings, params[i].grad());
      optimizer.step();
    }
    for (size_t i = 0; i < params.size(); ++i) {
      expect_close(params[i], want[i], c10::str(GetParam().name, ' ', dtype, " parameter ", i));
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    , Options,
    testing::Values(
        Case{"defaults", {}, {}}, Case{"lr", 0.3, {.lr = 0.3}}, Case{"lr_zero", 0.0, {.lr = 0}},
        Case{"momentum", LARSOptions(0.3).momentum(0.9), {.lr = 0.3, .momentum = 0.9}},
        Case{"weight_decay", LARSOptions(0.3).weight_decay(0.1), {.lr = 0.3, .weight_decay = 0.1}},
        Case{"trust_coefficient",
             LARSOptions(0.3).trust_coefficient(0.05),
             {.lr = 0.3, .trust_coefficient = 0.05}},
        Case{"eps", LARSOptions(0.3).eps(0.5), {.lr = 0.3, .eps = 0.5}},
        Case{"nesterov",
             LARSOptions(0.3).momentum(0.9).nesterov(true),
             {.lr = 0.3, .momentum = 0.9, .nesterov = true}},
        Case{"maximize",
             LARSOptions(0.3).weight_decay(0.1).maximize(true),
             {.lr = 0.3, .weight_decay = 0.1, .maximize = true}},
        Case{"trust_clip", LARSOptions(0.003).trust_clip(true), {.lr = 0.003, .trust_clip = true}},
        Case{"decayed_norm",
             LARSOptions(0.3).momentum(0.9).weight_decay(0.5).decayed_norm(true),
             {.lr = 0.3, .momentum = 0.9, .weight_decay = 0.5, .decayed_norm = true}},
        Case{"no_adaptation",
             LARSOptions(0.01).momentum(0.5).layer_adaptation(false),
             {.lr = 0.01, .momentum = 0.5, .layer_adaptation = false}},
        Case{"torch_momentum",
             LARSOptions(0.3).momentum(0.9).classic_momentum(false),
             {.lr = 0.3, .momentum = 0.9, .classic_momentum = false}},
        Case{"dampening",
             LARSOptions(0.3).momentum(0.9).dampening(0.4).classic_momentum(false),
             {.lr = 0.3, .momentum = 0.9, .dampening = 0.4, .classic_momentum = false}},
        Case{"torch_nesterov",
             LARSOptions(0.3).momentum(0.9).nesterov(true).classic_momentum(false),
             {.lr = 0.3, .momentum = 0.9, .nesterov = true, .classic_momentum = false}}),
    [](const auto& info) { return std::string(info.param.name); });

TEST(LARS, MasterWeightsKeepWhatHalfPrecisionWouldLose) {
  auto param = leaf({64}, 1, torch::kBFloat16);
  auto start = param.detach().to(torch::kDouble);
  expected::Parameter want(param);
  LARS optimizer({param}, LARSOptions(1.0).momentum(0.9).trust_coefficient(1e-4).master_weights(true));
  const expected::Settings settings{.lr = 1.0, .momentum = 0.9, .trust_coefficient = 1e-4};
  for (int step = 0; step < 20; ++step) {
    set_grads({param}, 100 + step);
    want.step(settings, param.grad());
    optimizer.step();
  }
  const auto& state = state_of(optimizer, param);
  EXPECT_EQ(state.momentum_buffer().scalar_type(), torch::kFloat);
  expect_close(state.master_param(), want);
  EXPECT_TRUE(same_bits(param.detach(), state.master_param().to(torch::kBFloat16)));
}

// A write, a value set by set_data, and one that changes nothing.
TEST(LARS, MastersTakeOverWhatIsWrittenIntoTheirParameters) {
  for (const auto dtype : {torch::kBFloat16, torch::kHalf}) {
    const auto param = leaf({64}, 1, dtype), twin = param.detach().to(torch::kFloat).requires_grad_();
    const auto options = LARSOptions(0.5).momentum(0.9).trust_coefficient(0.02);
    LARS optimizer({param}, LARSOptions(options).master_weights(true)), expected({twin}, options);
    for (int step = 0; step < 6; ++step) {
      const torch::NoGradGuard no_grad;
      if (step == 1) param.clamp_(-0.5, 0.5);
      if (step == 2) param.detach().slice(0, 3, 9).fill_(2.0);
      if (step == 3) param.set_data(param.data() * 2);
      if (step == 4) param.copy_(param.clone());
      const auto written = twin.to(dtype) != param;
      EXPECT_EQ(written.any().item<bool>(), step >= 1 && step <= 3) << step;
      twin.copy_(torch::where(written, param, twin));
      set_grads({param}, 100 + step);
      twin.mutable_grad() = param.grad().to(torch::kFloat);
      optimizer.step();
      expected.step();
      EXPECT_TRUE(same_bits(state_of(optimizer, param).master_param(), twin.detach())) << step;
      EXPECT_TRUE(same_bits(param.detach(), twin.detach().to(dtype))) << step;
    }
    EXPECT_FALSE(same_bits(twin.detach(), param.detach().to(torch::kFloat)));  // there is something to lose
  }
}

TEST(LARS, MastersTakeOverWhatIsWrittenAfterALoad) {
  const auto param = leaf({64}, 1, torch::kBFloat16);
  LARS optimizer({param}, LARSOptions(0.5).master_weights(true)), resumed(optimizer.param_groups(), {});
  set_grads({param}, 1);
  optimizer.step();
  std::stringstream file;
  torch::save(optimizer, file);
  torch::load(resumed, file);
  const auto before = state_of(resumed, param).master_param().clone();
  {
    const torch::NoGradGuard no_grad;
    param.detach().select(0, 5).fill_(3.0);
  }
  options_of(resumed, 0).lr(0.0);
  resumed.step();
  const auto want = before.clone();
  want.select(0, 5).fill_(3.0);
  EXPECT_TRUE(same_bits(state_of(resumed, param).master_param(), want));
}

// A group keeps what it was given, also where that is the value of a fresh LARSOptions, and has the
// optimizer's defaults for the rest.
TEST(LARS, DampeningThatComesLaterDampsTheBufferThatIsThere) {
  const auto param = leaf({4}, 1, torch::kDouble);
  expected::Parameter want(param);
  LARS optimizer(std::vector<torch::Tensor>{param}, LARSOptions(0.1).momentum(0.9).classic_momentum(false));
  expected::Settings settings{.lr = 0.1, .momentum = 0.9, .classic_momentum = false};
  for (const double dampening : {0.0, 0.5}) {
    options_of(optimizer, 0).dampening(dampening);
    settings.dampening = dampening;
    for (int step = 0; step < 2; ++step) {
      set_grads({param}, step);
      want.step(settings, param.grad());
      optimizer.step();
    }
  }
  expect_close(param, want);
}

TEST(LARS, MastersThatComeLaterWidenTheBufferThatIsThere) {
  const auto param = leaf({4}, 1, torch::kHalf);
  LARS optimizer(std::vector<torch::Tensor>{param}, LARSOptions(0.1).momentum(0.9));
  set_grads({param}, 1);
  optimizer.step();
  const auto before = state_of(optimizer, param).momentum_buffer().clone();
  options_of(optimizer, 0).master_weights(true);
  options_of(optimizer, 0).lr(0);
  optimizer.step();
  const auto after = state_of(optimizer, param).momentum_buffer();
  EXPECT_EQ(after.scalar_type(), torch::kFloat);
  EXPECT_TRUE(torch::allclose(after, before.to(torch::kFloat) * 0.9));
}

TEST(LARS, GroupsInheritWhatTheyLeaveOut) {
  const auto defaults = LARSOptions(0.25)
                            .momentum(0.9)
                            .weight_decay(1e-4)
                            .trust_coefficient(0.02)
                            .eps(1e-8)
                            .maximize(true)
                            .trust_clip(true)
                            .layer_adaptation(false)
                            .decayed_norm(true)
                            .classic_momentum(false)
                            .master_weights(true)
                            .nesterov(true);
  LARS optimizer(
      {group({leaf({2}, 1)}, LARSOptions()), OptimizerParamGroup({leaf({2}, 2)}),
       group({leaf({2}, 3)}, LARSOptions().weight_decay(0).layer_adaptation(true).trust_coefficient(0.001)),
       group({leaf({2}, 4)}, LARSOptions(1.0).momentum(0).nesterov(false).maximize(false)),
       group({leaf({2}, 5)},
             LARSOptions().eps(0.0).trust_clip(false).master_weights(false).classic_momentum(true))},
      defaults);
  EXPECT_EQ(options_of(optimizer, 0), defaults);
  EXPECT_EQ(options_of(optimizer, 1), defaults);
  EXPECT_EQ(options_of(optimizer, 2),
            LARSOptions(defaults).weight_decay(0).layer_adaptation(true).trust_coefficient(0.001));
  EXPECT_EQ(options_of(optimizer, 3),
            LARSOptions(defaults).lr(1.0).momentum(0).nesterov(false).maximize(false));
  EXPECT_EQ(options_of(optimizer, 4),
            LARSOptions(defaults).eps(0).trust_clip(false).master_weights(false).classic_momentum(true));
  EXPECT_FALSE(options_of(optimizer, 0) == options_of(optimizer, 2));

  LARSOptions damped;
  damped.dampening() = 0.5;  // given through the reference, as TORCH_ARG allows
  LARS torch_form(
      {group({leaf({2}, 1)}, damped), group({leaf({2}, 2)}, LARSOptions().dampening(0).nesterov(true))},
      LARSOptions(0.1).momentum(0.9).classic_momentum(false).dampening(0.25));
  EXPECT_EQ(options_of(torch_form, 0).dampening(), 0.5);
  EXPECT_EQ(options_of(torch_form, 1).dampening(), 0.0);
}

// Code that is written for torch's optimizers compiles and does the same.
TEST(LARSOptions, AreUsedAsThoseOfSGD) {
  const auto use = [](auto options) {
    options.lr() *= 0.5;
    double& lr = options.lr();
    lr = std::max(options.lr(), 0.3);
    options.momentum() += .1;
    bool& nesterov = options.nesterov();
    nesterov = !nesterov;
    options.weight_decay(1).dampening(std::min(options.weight_decay(), 0.25));
    options.set_lr(options.get_lr() * 2);
    const auto& constant = options;
    return std::vector<double>{constant.lr(), constant.momentum(), constant.weight_decay(),
                               constant.dampening(), static_cast<double>(constant.nesterov())};
  };
  EXPECT_EQ(use(LARSOptions(0.4)), use(torch::optim::SGDOptions(0.4)));
  EXPECT_EQ(use(LARSOptions(0.4)), (std::vector<double>{0.6, 0.1, 1, 0.25, 1}));
}

TEST(LARSOptions, ToReadOneIsNotToGiveIt) {
  LARSOptions options;
  EXPECT_EQ(std::max(options.lr(), 0.25), 1.0);
  EXPECT_EQ(options.momentum() + options.weight_decay(), 0.0);
  const auto defaults = LARSOptions(0.5).momentum(0.9).weight_decay(1e-4);
  LARS optimizer({group({leaf({2}, 1)}, options)}, defaults);
  EXPECT_EQ(options_of(optimizer, 0), defaults);
}

TEST(LARS, LayerAdaptationWhereThereIsWeightDecay) {
  std::vector<torch::Tensor> params{leaf({5, 5}, 1), leaf({5}, 2), leaf({6}, 3)};
  std::vector<expected::Parameter> want(params.begin(), params.end());
  LARS optimizer({OptimizerParamGroup({params[0]}), group({params[1]}, LARSOptions().weight_decay(0)),
                  group({params[2]}, LARSOptions().weight_decay(0).layer_adaptation(true))},
                 LARSOptions(0.1).momentum(0.9).weight_decay(0.05).layer_adaptation("decayed"));
  EXPECT_EQ(options_of(optimizer, 1).layer_adaptation(), "decayed");
  EXPECT_EQ(options_of(optimizer, 2).layer_adaptation(), true);
  std::vector<expected::Settings> settings(3, {.lr = 0.1, .momentum = 0.9, .weight_decay = 0.05});
  settings[1].weight_decay = settings[2].weight_decay = 0;
  settings[1].layer_adaptation = false;
  for (int step = 0; step < 4; ++step) {
    if (step == 2) {  // it follows what a group's decay becomes
      options_of(optimizer, 1).weight_decay(0.01);
      settings[1].weight_decay = 0.01;
      settings[1].layer_adaptation = true;
    }
    set_grads(params, 10 * (step + 1));
    for (size_t i = 0; i < params.size(); ++i) want[i].step(settings[i], params[i].grad());
    optimizer.step();
  }
  for (size_t i = 0; i < params.size(); ++i) expect_close(params[i], want[i], c10::str("parameter ", i));
  const auto clipped = LARSOptions(0.1).trust_clip(true).layer_adaptation("decayed");
  EXPECT_FALSE(clipped.hyperparameters().trust_clip);  // as what is not adapted in timm
  EXPECT_TRUE(LARSOptions(clipped).weight_decay(0.1).hyperparameters().trust_clip);
  EXPECT_EQ(MESSAGE_OF(LARSOptions().layer_adaptation("always"), fused_lars::InvalidOption),
            "Invalid layer_adaptation value: \"always\"; allowed: true, false, \"decayed\"");
}

TEST(LARS, GroupsAreSteppedWithTheirOwnOptions) {
  std::vector<torch::Tensor> params{leaf({5, 5}, 1), leaf({5}, 2), leaf({6}, 3)};
  std::vector<expected::Parameter> want(params.begin(), params.end());
  LARS optimizer({OptimizerParamGroup({params[0]}),
                  group({params[1]}, LARSOptions().weight_decay(0).layer_adaptation(false))},
                 LARSOptions(0.1).momentum(0.9).weight_decay(0.05));
  optimizer.add_param_group(group({params[2]}, LARSOptions(0.7).momentum(0)));
  const expected::Settings base{.lr = 0.1, .momentum = 0.9, .weight_decay = 0.05};
  auto second = base, third = base;
  second.weight_decay = 0;
  second.layer_adaptation = false;
  third.lr = 0.7;
  third.momentum = 0;
  for (int step = 0; step < 3; ++step) {
    set_grads(params, 10 * (step + 1));
    want[0].step(base, params[0].grad());
    want[1].step(second, params[1].grad());
    want[2].step(third, params[2].grad());
    optimizer.step();
  }
  for (size_t i = 0; i < params.size(); ++i) expect_close(params[i], want[i], c10::str("parameter ", i));
  EXPECT_EQ(optimizer.state().size(), 2u);  // without momentum nothing is kept
}

TEST(LARS, RefusesBadOptionsWhenAGroupIsAdded) {
  const auto param = leaf({2}, 1);
  const std::vector<torch::Tensor> params{param};
  MESSAGE_OF(LARS(params, LARSOptions(-1.0)), fused_lars::InvalidLearningRate);
  MESSAGE_OF(LARS(params, LARSOptions(0.1).nesterov(true)), fused_lars::InvalidOption);
  MESSAGE_OF(LARS({group(params, LARSOptions().eps(-1))}, 0.1), fused_lars::InvalidOption);
  LARS optimizer(params, LARSOptions(0.1).momentum(0.9));
  const auto other = leaf({2}, 2);
  EXPECT_EQ(MESSAGE_OF(optimizer.add_param_group(group({other}, LARSOptions().momentum(1.0))),
                       fused_lars::InvalidMomentum),
            "Invalid momentum value in group 1: 1; allowed: >= 0 and < 1");
  MESSAGE_OF(optimizer.add_param_group(group({other}, LARSOptions().weight_decay(-1))),
             fused_lars::InvalidWeightDecay);
  MESSAGE_OF(optimizer.add_param_group(group({other}, LARSOptions().trust_coefficient(0))),
             fused_lars::InvalidTrustCoefficient);
  // Sound by itself, not with what it inherits.
  MESSAGE_OF(optimizer.add_param_group(group({other}, LARSOptions().dampening(0.5))),
             fused_lars::InvalidOption);
  EXPECT_EQ(MESSAGE_OF(optimizer.add_param_group({{other}, std::make_unique<torch::optim::SGDOptions>(0.1)}),
                       fused_lars::InvalidOption),
            "param group 1 has the options of another optimizer; expected fused_lars::LARSOptions");
  EXPECT_EQ(
      MESSAGE_OF(optimizer.add_param_group(OptimizerParamGroup({other, param})), fused_lars::InvalidTensor),
      "parameter 1 of group 1 is in the optimizer already; expected every parameter once");
  MESSAGE_OF(optimizer.add_param_group(OptimizerParamGroup({other, other})), fused_lars::InvalidTensor);
  EXPECT_ANY_THROW(optimizer.add_param_group(OptimizerParamGroup({other * 2})));
  EXPECT_EQ(optimizer.param_groups().size(), 1u);

  options_of(optimizer, 0).set_lr(NAN);
  param.mutable_grad() = torch::ones({2});
  const auto before = param.detach().clone();
  MESSAGE_OF(optimizer.step(), fused_lars::InvalidLearningRate);
  EXPECT_TRUE(same_bits(param.detach(), before));
  EXPECT_EQ(optimizer.state().size(), 0u);
}

TEST(LARS, AllGroupsGoToOneOpCall) {
  std::vector<OptimizerParamGroup> groups;
  std::vector<torch::Tensor> params;
  for (int i = 0; i < 20; ++i) {
    params.push_back(leaf({i + 1}, i, i % 2 ? torch::kDouble : torch::kFloat));
    groups.push_back(group({params.back()}, LARSOptions().weight_decay(0.01 * i)));
  }
  LARS optimizer(groups, LARSOptions(0.1).momentum(0.9));
  set_grads(params, 100);
  static int calls;
  calls = 0;
  const auto handle =
      at::addThreadLocalCallback(at::RecordFunctionCallback([](const at::RecordFunction& function) {
        calls += std::string(function.name()).find("fused_lars::") == 0;
        return std::unique_ptr<at::ObserverContext>();
      }));
  optimizer.step();
  at::removeCallback(handle);
  EXPECT_EQ(calls, 1);
}

TEST(LARS, LeavesParametersWithoutGradientAlone) {
  std::vector<torch::Tensor> params{leaf({3}, 1), leaf({3}, 2), random_tensor({3}, 3)};
  const auto before = detached(params);
  LARS optimizer(params, LARSOptions(0.1).momentum(0.9).weight_decay(0.1));
  EXPECT_FALSE(optimizer.step().defined());
  params[1].mutable_grad() = torch::ones({3});
  optimizer.step();
  EXPECT_TRUE(same_bits(params[0].detach(), before[0]));
  EXPECT_FALSE(same_bits(params[1].detach(), before[1]));
  EXPECT_TRUE(same_bits(params[2], before[2]));
  EXPECT_EQ(optimizer.state().size(), 1u);
}

TEST(LARS, ClosureRunsWithGradientsAndItsLossIsReturned) {
  auto param = leaf({3}, 1);
  expected::Parameter want(param);
  LARS optimizer({param}, 0.5);
  const at::NoGradGuard no_grad;
  const auto loss = optimizer.step([&] {
    optimizer.zero_grad();
    auto loss = (param * param).sum();
    loss.backward();
    return loss;
  });
  EXPECT_TRUE(loss.requires_grad());
  want.step({.lr = 0.5}, param.grad());
  expect_close(param, want);
}

TEST(LARS, AFailedStepChangesNothing) {
  std::vector<torch::Tensor> params{leaf({3}, 1), leaf({3}, 2)};
  LARS optimizer(params, LARSOptions(0.1).momentum(0.9));
  set_grads(params, 10);
  params[1].mutable_grad() = torch::ones({3}).to_sparse();
  const auto before = detached(params);
  EXPECT_CONTAINS(MESSAGE_OF(optimizer.step(), fused_lars::InvalidTensor), "grads[1] has layout Sparse");
  expect_same_bits(params, before);
  EXPECT_EQ(optimizer.state().size(), 0u);
}

TEST(LARS, SchedulersOfTheFrontEndDriveIt) {
  auto param = leaf({4}, 1);
  auto frozen = leaf({4}, 2);
  expected::Parameter want(param);
  LARS optimizer({OptimizerParamGroup({param}), group({frozen}, LARSOptions(0.4))},
                 LARSOptions(0.8).momentum(0.9));
  torch::optim::StepLR scheduler(optimizer, /*step_size=*/2, /*gamma=*/0.5);
  expected::Settings settings{.lr = 0.8, .momentum = 0.9};
  for (int step = 0; step < 4; ++step) {
    settings.lr = step < 3 ? 0.8 : 0.4;  // torch's StepLR counts its first call as none
    set_grads({param}, 10 + step);
    want.step(settings, param.grad());
    optimizer.step();
    scheduler.step();
  }
  expect_close(param, want);
  EXPECT_DOUBLE_EQ(options_of(optimizer, 0).get_lr(), 0.4);
  EXPECT_DOUBLE_EQ(options_of(optimizer, 1).get_lr(), 0.2);
  torch::optim::ReduceLROnPlateauScheduler plateau(optimizer, torch::optim::ReduceLROnPlateauScheduler::min,
                                                   0.1f, /*patience=*/0);
  for (int step = 0; step < 3; ++step) plateau.step(1.0f);
  EXPECT_LT(options_of(optimizer, 0).get_lr(), 0.1);
}

// ---------------------------------------------------------------- momentum in few bits

// What the codes of an int8 buffer of at most 128 elements stand for.
torch::Tensor decoded(const LARSParamState& state) {
  const auto codes = state.momentum_buffer().to(torch::kFloat);
  return codes * codes.abs() / (127.0 * 127.0) * state.momentum_scale();
}

TEST(LARS, MomentumHasTheDtypeThatIsAskedFor) {
  using MomentumDtype = std::optional<torch::Dtype>;
  const auto check = [](torch::Dtype dtype, const LARSOptions& options, torch::Dtype buffer, bool rounds) {
    const auto what = c10::str(dtype, " as ", buffer, ", master_weights ", options.master_weights());
    const std::vector<torch::Tensor> params{leaf({300}, 1, dtype), leaf({}, 2, dtype),
                                            leaf({0, 2}, 3, dtype)};
    LARS optimizer(params, options);
    for (int step = 0; step < 3; ++step) {
      set_grads(params, 10 * (step + 1));
      optimizer.step();
    }
    for (int64_t i = 0; i < 3; ++i) {
      const auto& state = state_of(optimizer, params[i]);
      EXPECT_EQ(state.momentum_buffer().scalar_type(), buffer) << what;
      EXPECT_EQ(state.momentum_buffer().sizes(), params[i].sizes()) << what;
      ASSERT_EQ(state.momentum_scale().defined(), buffer == torch::kChar) << what;
      if (buffer == torch::kChar) {
        EXPECT_EQ(state.momentum_scale().numel(), i == 0 ? 3 : i == 1 ? 1 : 0) << what;
      }
      ASSERT_EQ(state.rng_state().defined(), rounds) << what;
      if (!rounds) continue;
      EXPECT_TRUE(
          torch::equal(state.rng_state(), torch::tensor({(int64_t{5} << 32) + i, int64_t{3}, int64_t{0}})))
          << what;
    }
  };
  const auto options = [](MomentumDtype dtype) {
    return LARSOptions(0.3).momentum(0.9).momentum_dtype(dtype).rounding_seed(5);
  };
  check(torch::kDouble, options({}), torch::kDouble, false);
  check(torch::kDouble, options(torch::kFloat), torch::kFloat, false);
  check(torch::kFloat, options({}), torch::kFloat, false);
  for (const auto dtype : {torch::kBFloat16, torch::kHalf, torch::kChar}) {
    check(torch::kFloat, options(dtype), dtype, true);
  }
  for (const auto dtype : {torch::kBFloat16, torch::kHalf}) {
    check(dtype, options({}), dtype, false);
    check(dtype, options(dtype), dtype, false);
    check(dtype, options(torch::kFloat), torch::kFloat, false);
    check(dtype, options(torch::kChar), torch::kChar, true);
    check(dtype, options({}).stochastic_rounding(true), dtype, true);
    check(dtype, options(torch::kFloat).stochastic_rounding(true), torch::kFloat, true);
    check(dtype, options({}).master_weights(true), torch::kFloat, false);
    check(dtype, options(dtype).master_weights(true), dtype, true);
    check(dtype, options(torch::kChar).master_weights(true), torch::kChar, true);
  }
}

// It loses 0.1 % a step. Half a unit of bf16 is at least 0.2 %, so the nearest number is the same.
TEST(LARS, MomentumDecaysWhereItWouldStandStill) {
  constexpr int kSteps = 500;
  for (const auto dtype : {torch::kBFloat16, torch::kChar}) {
    const int64_t size = dtype == torch::kChar ? 128 : 1000;
    const auto param = torch::zeros({size}).requires_grad_();
    LARS optimizer(std::vector<torch::Tensor>{param},
                   LARSOptions(1.0).momentum(0.999).layer_adaptation(false).momentum_dtype(dtype));
    param.mutable_grad() = torch::full({size}, 1.25);
    optimizer.step();
    options_of(optimizer, 0).lr(0.0);
    for (int step = 0; step < kSteps; ++step) optimizer.step();
    const auto& state = state_of(optimizer, param);
    const auto buffer = dtype == torch::kChar ? decoded(state) : state.momentum_buffer().to(torch::kFloat);
    EXPECT_NEAR(buffer.mean().item<double>(), 1.25 * std::pow(0.999, kSteps), 0.02) << dtype;
  }
}

TEST(LARS, StochasticRoundingKeepsUpdatesBelowHalfAUnit) {
  for (const bool rounds : {false, true}) {
    const auto param = torch::full({1000}, 1.5, torch::kBFloat16).requires_grad_();
    LARS optimizer(std::vector<torch::Tensor>{param},
                   LARSOptions(1.0).layer_adaptation(false).stochastic_rounding(rounds));
    param.mutable_grad() = torch::full({1000}, 0x1p-11, torch::kBFloat16);  // a unit is 2^-7
    for (int step = 0; step < 200; ++step) optimizer.step();
    const double moved = 1.5 - param.detach().to(torch::kDouble).mean().item<double>();
    EXPECT_NEAR(moved, rounds ? 200 * 0x1p-11 : 0.0, rounds ? 5e-3 : 0.0);
  }
}

TEST(LARS, SeedAndPlaceDecideTheRandomBits) {
  const auto run = [](int64_t seed) {
    const std::vector<torch::Tensor> params{leaf({200}, 1), leaf({200}, 1)};
    LARS optimizer(params,
                   LARSOptions(0.3).momentum(0.9).momentum_dtype(torch::kBFloat16).rounding_seed(seed));
    for (const auto& param : params) param.mutable_grad() = random_tensor({200}, 7);
    optimizer.step();
    return std::vector<torch::Tensor>{state_of(optimizer, params[0]).momentum_buffer(),
                                      state_of(optimizer, params[1]).momentum_buffer()};
  };
  const auto first = run(1), other = run(2);
  expect_same_bits(first, run(1));
  EXPECT_FALSE(torch::equal(first[0], first[1]));
  EXPECT_FALSE(torch::equal(first[0], other[0]));
}

TEST(LARS, MomentumIsConvertedWhenItsDtypeChanges) {
  const auto param = leaf({100}, 1);
  LARS optimizer(std::vector<torch::Tensor>{param}, LARSOptions(0.3).momentum(0.9));
  for (int step = 0; step < 3; ++step) {
    set_grads({param}, 10 + step);
    optimizer.step();
  }
  options_of(optimizer, 0).lr(0.0);
  auto before = state_of(optimizer, param).momentum_buffer().clone();
  for (const std::optional<torch::Dtype> dtype : std::initializer_list<std::optional<torch::Dtype>>{
           torch::kChar, torch::kBFloat16, torch::kHalf, torch::kChar, torch::kFloat}) {
    options_of(optimizer, 0).momentum_dtype(dtype);
    optimizer.step();
    const auto& state = state_of(optimizer, param);
    EXPECT_EQ(state.momentum_buffer().scalar_type(), *dtype);
    EXPECT_EQ(state.momentum_scale().defined(), *dtype == torch::kChar);
    const auto after =
        *dtype == torch::kChar ? decoded(state) : state.momentum_buffer().to(torch::kFloat, false, true);
    // Half a unit for the conversion and one for the step.
    const double unit = *dtype == torch::kChar ? 2.0 / 127 : *dtype == torch::kFloat ? 0x1p-22 : 0x1p-7;
    const auto most = before.abs().max().item<double>();
    EXPECT_LE((after - 0.9 * before).abs().max().item<double>(), 1.51 * unit * most) << *dtype;
    before = after;
  }
}

TEST(LARS, MomentumInFewBitsIsThatOfTheMaster) {
  for (const auto dtype : {torch::kBFloat16, torch::kChar}) {
    const auto param = leaf({300}, 1, torch::kBFloat16);
    const auto twin = param.detach().to(torch::kFloat).requires_grad_();
    const auto options = LARSOptions(0.5).momentum(0.9).trust_coefficient(0.02).momentum_dtype(dtype);
    LARS optimizer({param}, LARSOptions(options).master_weights(true)), expected({twin}, options);
    for (int step = 0; step < 4; ++step) {
      set_grads({param}, 100 + step);
      twin.mutable_grad() = param.grad().to(torch::kFloat);
      optimizer.step();
      expected.step();
    }
    const auto &state = state_of(optimizer, param), &of_twin = state_of(expected, twin);
    EXPECT_TRUE(same_bits(state.master_param(), twin.detach())) << dtype;
    EXPECT_TRUE(same_bits(state.momentum_buffer(), of_twin.momentum_buffer())) << dtype;
    EXPECT_TRUE(same_bits(state.rng_state(), of_twin.rng_state())) << dtype;
  }
}

TEST(LARS, OptionsOfRoundingAreChecked) {
  const std::vector<torch::Tensor> params{leaf({3}, 1)};
  for (const auto dtype : {torch::kDouble, torch::kInt, torch::kByte}) {
    EXPECT_CONTAINS(
        MESSAGE_OF(LARS(params, LARSOptions(0.1).momentum_dtype(dtype)), fused_lars::InvalidOption),
        "; allowed: Float, BFloat16, Half, Char");
    MESSAGE_OF(LARS({group(params, LARSOptions().momentum_dtype(dtype))}, 0.1), fused_lars::InvalidOption);
  }
  for (const int64_t seed : {int64_t{-1}, int64_t{1} << 31}) {
    EXPECT_CONTAINS(MESSAGE_OF(LARS(params, LARSOptions(0.1).rounding_seed(seed)), fused_lars::InvalidOption),
                    "Invalid rounding_seed value in group 0");
  }
  LARS(params, LARSOptions(0.1).rounding_seed((int64_t{1} << 31) - 1));
  EXPECT_CONTAINS(MESSAGE_OF(LARS(params, LARSOptions(0.1).stochastic_rounding(true).master_weights(true)),
                             fused_lars::InvalidOption),
                  "Invalid stochastic_rounding value");

  // What a parameter's dtype allows shows in the step.
  const auto refused = [](torch::Dtype param_dtype, torch::Dtype dtype) {
    const auto param = leaf({3}, 1, param_dtype);
    LARS optimizer(std::vector<torch::Tensor>{param}, LARSOptions(0.1).momentum(0.9));
    set_grads({param}, 1);
    optimizer.step();
    options_of(optimizer, 0).momentum_dtype(dtype);
    const auto before = param.detach().clone();
    EXPECT_CONTAINS(MESSAGE_OF(optimizer.step(), fused_lars::InvalidTensor),
                    c10::str("momentum_buffers[0] has dtype ", dtype));
    EXPECT_TRUE(same_bits(param.detach(), before));
    EXPECT_EQ(state_of(optimizer, param).momentum_buffer().scalar_type(), param_dtype);
  };
  refused(torch::kDouble, torch::kChar);
  refused(torch::kDouble, torch::kBFloat16);
  refused(torch::kBFloat16, torch::kHalf);
  refused(torch::kHalf, torch::kBFloat16);
}

TEST(LARS, GroupsInheritTheOptionsOfRounding) {
  const auto defaults =
      LARSOptions(0.25).momentum_dtype(torch::kChar).stochastic_rounding(true).rounding_seed(7);
  LARS optimizer(
      {group({leaf({2}, 1)}, LARSOptions()),
       group({leaf({2}, 2)}, LARSOptions().momentum_dtype(std::nullopt).rounding_seed(0)),
       group({leaf({2}, 3)}, LARSOptions().stochastic_rounding(false).momentum_dtype(torch::kFloat))},
      defaults);
  EXPECT_EQ(options_of(optimizer, 0), defaults);
  EXPECT_EQ(options_of(optimizer, 1), LARSOptions(defaults).momentum_dtype(std::nullopt).rounding_seed(0));
  EXPECT_EQ(options_of(optimizer, 2),
            LARSOptions(defaults).stochastic_rounding(false).momentum_dtype(torch::kFloat));
  EXPECT_FALSE(options_of(optimizer, 0) == LARSOptions(defaults).rounding_seed(8));
  EXPECT_FALSE(options_of(optimizer, 0) == LARSOptions(defaults).momentum_dtype(torch::kHalf));
}

// Two runs of one program: the second one is saved half-way and goes on in new objects.
class Resume : public testing::Test {
 protected:
  static std::vector<torch::Tensor> make_params() {
    return {leaf({6, 5}, 1), leaf({9}, 2, torch::kBFloat16), leaf({9}, 3, torch::kDouble), leaf({2}, 4)};
  }
  static LARS make(const std::vector<torch::Tensor>& params, LARSOptions defaults = 1.0) {
    return LARS({OptimizerParamGroup({params[0], params[1]}),
                 group({params[2], params[3]}, LARSOptions().weight_decay(0))},
                defaults);
  }
  static LARSOptions options() {
    return LARSOptions(0.3)
        .momentum(0.9)
        .weight_decay(0.01)
        .dampening(0.25)
        .decayed_norm(true)
        .classic_momentum(false)
        .master_weights(true);
  }
  static void train(LARS& optimizer, const std::vector<torch::Tensor>& params, int from, int to) {
    for (int step = from; step < to; ++step) {
      set_grads(params, 10 * (step + 1));
      params[3].mutable_grad() = torch::Tensor();
      optimizer.step();
    }
  }
  static std::string saved(const torch::optim::Optimizer& optimizer) {
    std::ostringstream stream;
    torch::save(optimizer, stream);
    return stream.str();
  }
  static void load(torch::optim::Optimizer& optimizer, const std::string& archive) {
    std::istringstream stream(archive);
    torch::load(optimizer, stream);
  }
};

TEST_F(Resume, GivesTheBitsOfAnUninterruptedRun) {
  auto params = make_params();
  auto optimizer = make(params, options());
  train(optimizer, params, 0, 3);
  const auto archive = saved(optimizer);
  auto resumed_params = detached(params);
  for (auto& param : resumed_params) param.requires_grad_();
  train(optimizer, params, 3, 6);

  auto resumed = make(resumed_params);
  load(resumed, archive);
  EXPECT_EQ(options_of(resumed, 0), options());
  EXPECT_EQ(options_of(resumed, 1), LARSOptions(options()).weight_decay(0));
  EXPECT_EQ(resumed.state().size(), 3u);
  EXPECT_EQ(state_of(resumed, resumed_params[1]).master_param().scalar_type(), torch::kFloat);
  train(resumed, resumed_params, 3, 6);
  expect_same_bits(params, resumed_params);
}

// The random bits go on too.
TEST_F(Resume, MomentumInFewBitsGoesOn) {
  const auto run = [](torch::Dtype dtype, const LARSOptions& options) {
    std::vector<torch::Tensor> params{leaf({300}, 1, dtype), leaf({6, 5}, 2, dtype)};
    LARS optimizer(params, options);
    const auto train = [](LARS& optimizer, const std::vector<torch::Tensor>& params, int from, int to) {
      for (int step = from; step < to; ++step) {
        set_grads(params, 10 * (step + 1));
        optimizer.step();
      }
    };
    train(optimizer, params, 0, 3);
    auto resumed_params = detached(params);
    for (auto& param : resumed_params) param.requires_grad_();
    LARS resumed(resumed_params, LARSOptions(1.0).rounding_seed(77));
    load(resumed, saved(optimizer));
    EXPECT_EQ(options_of(resumed, 0), options);
    train(optimizer, params, 3, 6);
    train(resumed, resumed_params, 3, 6);
    expect_same_bits(params, resumed_params);
    for (size_t i = 0; i < params.size(); ++i) {
      const auto &state = state_of(optimizer, params[i]), &other = state_of(resumed, resumed_params[i]);
      EXPECT_TRUE(same_bits(state.momentum_buffer(), other.momentum_buffer()));
      EXPECT_EQ(state.momentum_scale().defined(), other.momentum_scale().defined());
      if (state.momentum_scale().defined()) {
        EXPECT_TRUE(same_bits(state.momentum_scale(), other.momentum_scale()));
      }
      EXPECT_TRUE(same_bits(state.rng_state(), other.rng_state()));
    }
  };
  const auto options = LARSOptions(0.3).momentum(0.9).weight_decay(0.01).rounding_seed(5);
  for (const auto dtype : {torch::kBFloat16, torch::kHalf, torch::kChar}) {
    run(torch::kFloat, LARSOptions(options).momentum_dtype(dtype));
  }
  run(torch::kBFloat16, LARSOptions(options).stochastic_rounding(true));
  run(torch::kHalf, LARSOptions(options).stochastic_rounding(true).momentum_dtype(torch::kChar));
  run(torch::kBFloat16, LARSOptions(options).stochastic_rounding(true).momentum_dtype(torch::kFloat));
  run(torch::kBFloat16, LARSOptions(options).master_weights(true).momentum_dtype(torch::kBFloat16));
  run(torch::kBFloat16, LARSOptions(options).master_weights(true).momentum_dtype(torch::kChar));
}

TEST_F(Resume, LayerAdaptationIsKept) {
  for (const fused_lars::LayerAdaptation kind : {fused_lars::LayerAdaptation(true), {false}, {"decayed"}}) {
    auto params = make_params();
    auto optimizer = make(params, LARSOptions(0.3).layer_adaptation(kind));
    auto loaded = make(params);
    load(loaded, saved(optimizer));
    EXPECT_EQ(options_of(loaded, 1), options_of(optimizer, 1));
    EXPECT_EQ(options_of(loaded, 1).layer_adaptation(), kind);
  }
}

// As load_state_dict in Python: to the parameter's dtype, but fp32 beside 16 bits stays.
TEST_F(Resume, StateIsKeptInTheDtypeOfItsParameter) {
  for (const auto from : {torch::kDouble, torch::kFloat, torch::kBFloat16}) {
    for (const auto to : {torch::kDouble, torch::kFloat, torch::kBFloat16}) {
      const auto what = c10::str(from, " to ", to);
      const auto trained = leaf({9}, 1, from);
      LARS optimizer(std::vector<torch::Tensor>{trained}, options());
      set_grads({trained}, 1);
      optimizer.step();
      const auto param = trained.detach().to(to, /*non_blocking=*/false, /*copy=*/true).requires_grad_();
      LARS loaded(std::vector<torch::Tensor>{param}, 1.0);
      load(loaded, saved(optimizer));
      const auto expected_dtype = to == torch::kBFloat16 && from != torch::kDouble ? torch::kFloat : to;
      const auto buffer = state_of(loaded, param).momentum_buffer();
      EXPECT_TRUE(same_bits(buffer, state_of(optimizer, trained).momentum_buffer().to(expected_dtype)))
          << what;
      set_grads({param}, 2);
      loaded.step();
      EXPECT_EQ(state_of(loaded, param).step().item<float>(), 2) << what;
    }
  }
}

TEST_F(Resume, StateThatDoesNotFitIsRefusedByLoad) {
  auto params = make_params();
  auto target = make(params, LARSOptions(0.7));
  const auto load_spoilt = [&](auto spoil) {
    auto optimizer = make(params, options());
    train(optimizer, params, 0, 1);
    spoil(state_of(optimizer, params[2]));
    load(target, saved(optimizer));
  };
  EXPECT_EQ(
      MESSAGE_OF(load_spoilt([](auto& state) { state.step(torch::zeros({3})); }), fused_lars::ShapeMismatch),
      "the archive's step in group 1 has shape [3]; expected 1 element");
  EXPECT_EQ(
      MESSAGE_OF(load_spoilt([](auto& state) { state.momentum_buffer(torch::zeros({3})); }),
                 fused_lars::ShapeMismatch),
      "the archive's momentum_buffer in group 1 has shape [3]; expected the shape of its parameter, [9]");
  EXPECT_CONTAINS(
      MESSAGE_OF(load_spoilt([](auto& state) { state.momentum_buffer(torch::zeros({9}, torch::kLong)); }),
                 fused_lars::InvalidTensor),
      "the archive's momentum_buffer in group 1 has dtype Long");
  EXPECT_EQ(MESSAGE_OF(load_spoilt([](auto& state) { state.rng_state(torch::zeros({3})); }),
                       fused_lars::InvalidTensor),
            "the archive's rng_state in group 1 is Float[3]; expected Long [3]");
  EXPECT_EQ(
      MESSAGE_OF(load_spoilt([](auto& state) { state.momentum_buffer(torch::zeros({9}, torch::kChar)); }),
                 fused_lars::InvalidTensor),
      "the archive's momentum_buffer in group 1 is int8 and has no momentum_scale");
  EXPECT_EQ(target.state().size(), 0u);
  EXPECT_EQ(options_of(target, 0).lr(), 0.7);
}

TEST_F(Resume, LoadReplacesTheStateThatWasThere) {
  auto params = make_params();
  auto optimizer = make(params, options());
  const auto fresh = saved(optimizer);
  train(optimizer, params, 0, 1);
  load(optimizer, fresh);
  EXPECT_EQ(optimizer.state().size(), 0u);
}

TEST_F(Resume, AFailedLoadChangesNothing) {
  auto params = make_params();
  auto optimizer = make(params, options());
  train(optimizer, params, 0, 1);
  auto archive = saved(optimizer);

  torch::optim::SGD sgd(
      {OptimizerParamGroup({params[0], params[1]}), OptimizerParamGroup({params[2], params[3]})}, 0.1);
  EXPECT_CONTAINS(MESSAGE_OF(load(optimizer, saved(sgd)), fused_lars::InvalidOption),
                  "the archive has no option trust_coefficient");

  auto other_params = make_params();
  other_params[0] = leaf({5, 6}, 1);
  auto other_shapes = make(other_params, LARSOptions(0.7));
  EXPECT_CONTAINS(MESSAGE_OF(load(other_shapes, archive), fused_lars::ShapeMismatch),
                  "[6, 5]; expected the shape of its parameter, [5, 6]");
  EXPECT_EQ(other_shapes.state().size(), 0u);
  EXPECT_EQ(options_of(other_shapes, 0).lr(), 0.7);

  LARS one_group(make_params(), 0.7);
  EXPECT_ANY_THROW(load(one_group, archive));
  EXPECT_EQ(options_of(one_group, 0).lr(), 0.7);

  options_of(optimizer, 1).lr(-1.0);
  auto target = make(params, LARSOptions(0.7));
  MESSAGE_OF(load(target, saved(optimizer)), fused_lars::InvalidLearningRate);
  EXPECT_EQ(options_of(target, 0).lr(), 0.7);
  EXPECT_EQ(target.state().size(), 0u);
}

TEST(LARS, TrainsAModelOfTheFrontEnd) {
  torch::manual_seed(0);
  torch::nn::Sequential model(torch::nn::Linear(8, 16), torch::nn::ReLU(), torch::nn::Linear(16, 1));
  const auto inputs = random_tensor({64, 8}, 1), targets = inputs.sum(1, true);
  const std::unique_ptr<torch::optim::Optimizer> optimizer =
      std::make_unique<LARS>(model->parameters(), LARSOptions(1.0).momentum(0.9).trust_coefficient(0.02));
  double first = 0, last = 0;
  for (int step = 0; step < 60; ++step) {
    const auto loss = torch::mse_loss(model->forward(inputs), targets);
    optimizer->zero_grad();
    loss.backward();
    optimizer->step();
    (step == 0 ? first : last) = loss.item<double>();
  }
  EXPECT_LT(last, 0.1 * first);
}

}  // namespace
