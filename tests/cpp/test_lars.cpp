// fused_lars::Lars, the optimizer that is keyed by a parameter id.

#include <torch/torch.h>

#include <sstream>
#include <thread>

#include "expected.h"
#include "fused_lars/lars.h"

namespace {

using fused_lars::Lars;

std::string printed(const Lars& lars) {
  std::ostringstream text;
  text << lars;
  return text.str();
}

Lars with_everything(double lr = 0.5) {
  return Lars(lr).with_momentum(0.9).with_weight_decay(0.01).with_trust_coefficient(0.02);
}

const expected::Settings everything{
    .lr = 0.5, .momentum = 0.9, .weight_decay = 0.01, .trust_coefficient = 0.02};

torch::Tensor leaf(int seed, std::vector<int64_t> shape = {3, 4}) {
  return random_tensor(std::move(shape), seed).requires_grad_();
}

TEST(Lars, PrintsItsSettingsAndTheNumberOfStates) {
  EXPECT_EQ(printed(Lars(0.1)),
            "Lars(lr=0.1, momentum=0, weight_decay=0, trust_coefficient=0.001, states=0)");
  auto lars = with_everything();
  lars.step(3, random_tensor({4}, 0), random_tensor({4}, 1));
  lars.step(-8, random_tensor({4}, 2), random_tensor({4}, 3));
  EXPECT_EQ(printed(lars), "Lars(lr=0.5, momentum=0.9, weight_decay=0.01, trust_coefficient=0.02, states=2)");
}

TEST(Lars, BuildersReturnTheOptimizer) {
  Lars lars(0.1);
  EXPECT_EQ(&lars.with_momentum(0.5), &lars);
  EXPECT_EQ(&lars.with_weight_decay(0.5), &lars);
  EXPECT_EQ(&lars.with_trust_coefficient(0.5), &lars);
}

TEST(Lars, RefusesSettingsOutOfRangeAndKeepsItsOwn) {
  const double nan = std::nan(""), infinity = INFINITY;
  auto lars = with_everything();
  const auto before = printed(lars);
  for (const double bad : {-1e-300, nan, infinity, -infinity}) {
    MESSAGE_OF(Lars{bad}, fused_lars::InvalidLearningRate);
    MESSAGE_OF(lars.set_learning_rate(bad), fused_lars::InvalidLearningRate);
    MESSAGE_OF(lars.with_weight_decay(bad), fused_lars::InvalidWeightDecay);
  }
  for (const double bad : {-0.1, 1.0, 1.5, nan, infinity}) {
    MESSAGE_OF(lars.with_momentum(bad), fused_lars::InvalidMomentum);
  }
  for (const double bad : {0.0, -0.1, nan, infinity}) {
    MESSAGE_OF(lars.with_trust_coefficient(bad), fused_lars::InvalidTrustCoefficient);
  }
  EXPECT_EQ(printed(lars), before);
  EXPECT_EQ(MESSAGE_OF(Lars(0.1).with_momentum(1.5), fused_lars::InvalidMomentum),
            "Invalid momentum value: 1.5; allowed: >= 0 and < 1");
  lars.set_learning_rate(0.0);  // a scheduler's last step
  EXPECT_EQ(lars.learning_rate(), 0.0);
}

TEST(Lars, ErrorsAreCaughtAsOneBaseAsValueErrorAndAsStdException) {
  EXPECT_THROW(Lars(-1), fused_lars::Error);
  EXPECT_THROW(Lars(-1), c10::ValueError);
  EXPECT_THROW(Lars(-1), std::exception);
}

class LarsDtypes : public testing::TestWithParam<torch::Dtype> {};

TEST_P(LarsDtypes, FollowsTheRuleOfEveryParameter) {
  auto lars = with_everything();
  auto settings = everything;
  std::vector<torch::Tensor> weights{random_tensor({5, 7}, 1, GetParam()),
                                     random_tensor({9001}, 2, GetParam()), random_tensor({}, 3, GetParam())};
  std::vector<expected::Parameter> want(weights.begin(), weights.end());
  for (int step = 0; step < 5; ++step) {
    settings.lr = 0.5 - 0.1 * step;
    lars.set_learning_rate(settings.lr);
    for (int id = 0; id < 3; ++id) {
      const auto grad = random_tensor(weights[id].sizes().vec(), 10 * step + id, GetParam());
      lars.step(id, weights[id], grad);
      want[id].step(settings, grad);
    }
  }
  for (int id = 0; id < 3; ++id) expect_close(weights[id], want[id], c10::str("parameter ", id));
}

INSTANTIATE_TEST_SUITE_P(, LarsDtypes,
                         testing::Values(torch::kFloat, torch::kDouble, torch::kHalf, torch::kBFloat16),
                         [](const auto& info) { return std::string(c10::toString(info.param)); });

TEST(Lars, DividesByTheNormOfTheDecayedGradientWhereAsked) {
  auto lars = with_everything().with_weight_decay(0.5).with_decayed_norm(true);
  EXPECT_CONTAINS(printed(lars), ", decayed_norm=True, states=0)");
  auto settings = everything;
  settings.weight_decay = 0.5;
  settings.decayed_norm = true;
  auto weights = random_tensor({9001}, 1);
  expected::Parameter want(weights);
  for (int step = 0; step < 3; ++step) {
    const auto grad = random_tensor({9001}, 5 + step);
    lars.step(0, weights, grad);
    want.step(settings, grad);
    lars = Lars::from_state(lars.state());  // which keeps the option
  }
  expect_close(weights, want);
  lars.with_decayed_norm(false);
  EXPECT_EQ(printed(lars).find("decayed_norm"), std::string::npos);
}

TEST(Lars, DefaultsArePlainLayerwiseScaling) {
  auto weights = random_tensor({11}, 1);
  expected::Parameter want(weights);
  Lars lars(2.0);
  for (int step = 0; step < 3; ++step) {
    const auto grad = random_tensor({11}, 5 + step);
    lars.step(0, weights, grad);
    want.step({.lr = 2.0}, grad);
  }
  expect_close(weights, want);
  EXPECT_CONTAINS(printed(lars), "states=0");
}

TEST(Lars, UpdatesStridedAndEmptyTensorsInPlace) {
  auto whole = random_tensor({6, 8}, 1);
  const auto untouched = whole.clone();
  auto column = whole.select(1, 2);
  expected::Parameter want(column);
  auto lars = with_everything();
  for (int step = 0; step < 3; ++step) {
    const auto grad = random_tensor({8, 6}, step).select(0, 1);
    lars.step(0, column, grad);
    want.step(everything, grad);
    lars.step(1, torch::empty({0, 3}), torch::empty({0, 3}));
  }
  expect_close(column, want);
  EXPECT_TRUE(same_bits(whole.slice(1, 3), untouched.slice(1, 3)));
  EXPECT_TRUE(same_bits(whole.slice(1, 0, 2), untouched.slice(1, 0, 2)));
}

// What is under an id starts again when a tensor of another shape comes: as a new optimizer would do it.
TEST(Lars, VelocityStartsAgainWhenTheShapeChanges) {
  auto lars = with_everything();
  lars.step(0, random_tensor({4}, 1), random_tensor({4}, 2));
  for (const auto& [shape, dtype] : std::vector<std::pair<std::vector<int64_t>, torch::Dtype>>{
           {{2, 2}, torch::kFloat}, {{4}, torch::kDouble}}) {
    auto weights = random_tensor(shape, 3, dtype), fresh_weights = weights.clone();
    const auto grad = random_tensor(shape, 4, dtype);
    auto fresh = with_everything();
    for (int step = 0; step < 2; ++step) {
      lars.step(0, weights, grad);
      fresh.step(0, fresh_weights, grad);
    }
    EXPECT_TRUE(same_bits(weights, fresh_weights)) << shape << dtype;
  }
  EXPECT_CONTAINS(printed(lars), "states=1");
}

// A module that is moved by .double() takes its weights along, not the optimizer that it holds.
TEST(Lars, VelocityFollowsItsWeightsToAnotherDtype) {
  auto lars = with_everything();
  auto weights = random_tensor({4}, 1);
  expected::Parameter want(weights);
  for (const auto dtype : {torch::kFloat, torch::kDouble, torch::kFloat}) {
    weights = weights.to(dtype);
    const auto grad = random_tensor({4}, 2, dtype);
    lars.step(0, weights, grad);
    want.step(everything, grad);
    expect_close(weights.to(torch::kFloat), want, c10::str(dtype));
  }
  const auto failed = random_tensor({4}, 3, torch::kDouble);
  MESSAGE_OF(lars.step(0, failed, torch::ones({4}, torch::kInt)), fused_lars::InvalidTensor);
  EXPECT_EQ(std::get<3>(lars.state())[0].scalar_type(), torch::kFloat) << "a failed step has converted it";
}

TEST(Lars, ClearStateForgetsEveryVelocity) {
  auto lars = with_everything(), fresh = with_everything();
  auto weights = random_tensor({4}, 1);
  const auto grad = random_tensor({4}, 2);
  lars.step(0, weights, grad);
  lars.clear_state();
  EXPECT_EQ(printed(lars), printed(fresh));
  auto same = weights.clone();
  lars.step(0, weights, grad);
  fresh.step(0, same, grad);
  EXPECT_TRUE(same_bits(weights, same));
}

TEST(Lars, AFailedStepChangesNothing) {
  auto lars = with_everything();
  auto kept = random_tensor({4}, 1), other = random_tensor({4}, 2);
  lars.step(0, kept, random_tensor({4}, 3));
  const auto before = printed(lars);
  const auto kept_before = kept.clone(), other_before = other.clone();
  const auto grad = random_tensor({4}, 4);
  auto untouched = lars;

  EXPECT_EQ(MESSAGE_OF(lars.step(7, other, random_tensor({2, 2}, 4)), fused_lars::ShapeMismatch),
            "the gradient of parameter 7 has shape [2, 2]; expected the shape of its weights, [4]");
  MESSAGE_OF(lars.step(7, other, grad.to(torch::kHalf)), fused_lars::InvalidTensor);
  MESSAGE_OF(lars.step(7, other, grad.to_sparse()), fused_lars::InvalidTensor);
  MESSAGE_OF(lars.step(7, other, torch::Tensor()), fused_lars::InvalidTensor);
  MESSAGE_OF(lars.step(7, torch::Tensor(), grad), fused_lars::InvalidTensor);
  MESSAGE_OF(lars.step(7, torch::ones({4}, torch::kLong), grad), fused_lars::InvalidTensor);
  MESSAGE_OF(lars.step(7, torch::ones({1}).expand({4}), grad), fused_lars::InvalidTensor);
  MESSAGE_OF(lars.step(7, other, torch::ones({4}, torch::kMeta)), fused_lars::InvalidTensor);
  // The first of two is sound and must not be stepped either.
  MESSAGE_OF(lars.step_all({0, 7}, {kept, other}, {grad, grad.to(torch::kHalf)}), fused_lars::InvalidTensor);
  MESSAGE_OF(lars.step_all({0, 7}, {kept, other}, {grad}), fused_lars::InvalidOption);
  MESSAGE_OF(lars.step_all({0}, {kept, other}, {grad, grad}), fused_lars::InvalidOption);
  EXPECT_EQ(MESSAGE_OF(lars.step_all({7, 7}, {kept, other}, {grad, grad}), fused_lars::InvalidOption),
            "parameter id 7 comes more than once; expected distinct ids");
  MESSAGE_OF(lars.step_all({0, 7}, {kept, kept}, {grad, grad}), fused_lars::InvalidTensor);

  EXPECT_EQ(printed(lars), before);
  EXPECT_TRUE(same_bits(kept, kept_before));
  EXPECT_TRUE(same_bits(other, other_before));
  auto same = kept.clone();
  lars.step(0, kept, grad);
  untouched.step(0, same, grad);
  EXPECT_TRUE(same_bits(kept, same)) << "the velocity under id 0 has changed";
}

// Parameters on the CPU are not stepped when those of another device turn out to be bad.
TEST(Lars, AFailedStepOfTwoDevicesChangesNeither) {
  auto lars = with_everything();
  auto weights = random_tensor({4}, 1);
  const auto before = weights.clone(), grad = random_tensor({4}, 2);
  const auto meta = torch::ones({4}, torch::kMeta),
             bad = torch::ones({4}, torch::dtype(torch::kHalf).device(torch::kMeta));
  MESSAGE_OF(lars.step_all({0, 1}, {weights, meta}, {grad, bad}), fused_lars::InvalidTensor);
  EXPECT_TRUE(same_bits(weights, before));
  EXPECT_CONTAINS(printed(lars), "states=0");
  lars.step_all({0, 1}, {weights, meta}, {grad, meta});
  EXPECT_FALSE(same_bits(weights, before));
}

TEST(Lars, StepAllGivesTheBitsOfSingleSteps) {
  auto together = with_everything(), apart = with_everything();
  std::vector<torch::Tensor> a, b;
  for (int id = 0; id < 4; ++id) {
    a.push_back(random_tensor({id, 50 * id + 1}, id, id == 2 ? torch::kDouble : torch::kFloat));
    b.push_back(a.back().clone());
  }
  for (int step = 0; step < 3; ++step) {
    std::vector<torch::Tensor> grads;
    for (int id = 0; id < 4; ++id) {
      grads.push_back(random_tensor(a[id].sizes().vec(), 10 * step + id, a[id].scalar_type()));
      apart.step(id, b[id], grads[id]);
    }
    together.step_all({0, 1, 2, 3}, a, grads);
  }
  for (int id = 0; id < 4; ++id) EXPECT_TRUE(same_bits(a[id], b[id])) << id;
  EXPECT_EQ(printed(together), printed(apart));
  together.step_all({}, {}, {});
}

TEST(Lars, StepsTheNodesOfAGraphThatRequireGrad) {
  auto lars = with_everything(), direct = with_everything();
  std::vector<torch::Tensor> graph{leaf(1), random_tensor({3, 4}, 2), leaf(3)};
  const auto frozen = graph[1].clone();
  auto same = graph[0].detach().clone();
  (graph[0] * graph[1]).sum().backward();

  lars.step_graph_node(graph, 0);
  direct.step(0, same, graph[0].grad());
  EXPECT_TRUE(same_bits(graph[0].detach(), same));
  EXPECT_TRUE(graph[0].is_leaf() && graph[0].requires_grad());
  lars.step_graph_node(graph, 1);
  EXPECT_TRUE(same_bits(graph[1], frozen));
  EXPECT_CONTAINS(printed(lars), "states=1");

  const auto before = graph[2].detach().clone();
  EXPECT_EQ(MESSAGE_OF(lars.step_graph_node(graph, 2), fused_lars::MissingGradient),
            "node 2 of the graph requires grad and has no gradient; run backward first");
  EXPECT_TRUE(same_bits(graph[2].detach(), before));
  EXPECT_EQ(MESSAGE_OF(lars.step_graph_node(graph, 3), fused_lars::InvalidNode),
            "node 3 is not in the graph; allowed: indices of its 3 leaves, from 0");
  MESSAGE_OF(lars.step_graph_node(graph, -1), fused_lars::InvalidNode);
  MESSAGE_OF(lars.step_graph_node({}, 0), fused_lars::InvalidNode);
  MESSAGE_OF(lars.step_graph_node({graph[0] * 2}, 0), fused_lars::InvalidTensor);
  MESSAGE_OF(lars.step_graph_node({torch::Tensor()}, 0), fused_lars::InvalidTensor);
  EXPECT_CONTAINS(printed(lars), "states=1");

  // The node is the state's id.
  graph[0].mutable_grad() = random_tensor({3, 4}, 9);
  lars.step_graph_node(graph, 0);
  direct.step(0, same, graph[0].grad());
  EXPECT_TRUE(same_bits(graph[0].detach(), same));
}

// A step is no part of a graph, and autograd notices that a saved tensor was overwritten.
TEST(Lars, StepsLeavesOutsideOfAutograd) {
  auto weights = leaf(1);
  auto square = (weights * weights).sum();
  auto lars = with_everything();
  lars.step(0, weights, torch::ones({3, 4}));
  EXPECT_FALSE(weights.grad_fn());
  EXPECT_THROW(square.backward(), c10::Error);
  (weights * weights).sum().backward();
  lars.step_graph_node({weights}, 0);
}

TEST(Lars, CopiesAreDeep) {
  auto original = with_everything();
  auto weights = random_tensor({4}, 1);
  const auto grad = random_tensor({4}, 2);
  original.step(0, weights, grad);
  auto copy = original;
  Lars assigned(9.0);
  assigned = original;
  EXPECT_EQ(printed(copy), printed(original));
  EXPECT_EQ(printed(assigned), printed(original));

  auto a = weights.clone(), b = weights.clone(), c = weights.clone();
  for (int step = 0; step < 2; ++step) copy.step(0, a, grad);  // must not move the others' velocity
  original.step(0, b, grad);
  assigned.step(0, c, grad);
  EXPECT_TRUE(same_bits(b, c));
  assigned.step(0, c, grad);
  EXPECT_TRUE(same_bits(a, c));
  const auto before = printed(original);
  copy.with_momentum(0.1).clear_state();
  EXPECT_EQ(printed(original), before);
}

TEST(Lars, StateRoundTripsAndOtherVersionsAreRefused) {
  auto original = with_everything();
  auto weights = random_tensor({4}, 1);
  const auto grad = random_tensor({4}, 2);
  original.step(5, weights, grad);
  auto restored = Lars::from_state(original.state());
  EXPECT_EQ(printed(restored), printed(original));
  auto same = weights.clone();
  original.step(5, weights, grad);
  restored.step(5, same, grad);
  EXPECT_TRUE(same_bits(weights, same)) << "state is lost or shared";

  auto state = original.state();
  std::get<0>(state) = 3;
  EXPECT_EQ(MESSAGE_OF(Lars::from_state(state), fused_lars::InvalidOption),
            "the stored Lars has format version 3; this library reads version 2");
  state = original.state();
  std::get<1>(state).pop_back();
  MESSAGE_OF(Lars::from_state(state), fused_lars::InvalidOption);
  state = original.state();
  std::get<2>(state).push_back(6);
  MESSAGE_OF(Lars::from_state(state), fused_lars::InvalidOption);
  state = original.state();
  std::get<1>(state)[1] = 3.0;
  MESSAGE_OF(Lars::from_state(state), fused_lars::InvalidMomentum);

  // A step would take these for momentum, or not get so far.
  for (const auto& bad : {torch::Tensor(), torch::ones({4}, torch::kLong), torch::ones({4}).to_sparse()}) {
    state = original.state();
    std::get<3>(state)[0] = bad;
    EXPECT_CONTAINS(MESSAGE_OF(Lars::from_state(state), fused_lars::InvalidTensor),
                    "the stored momentum buffer of parameter 5 is ");
  }
  state = original.state();
  std::get<2>(state).push_back(5);
  std::get<3>(state).push_back(torch::ones({4}));
  EXPECT_EQ(MESSAGE_OF(Lars::from_state(state), fused_lars::InvalidOption),
            "the stored Lars has two momentum buffers for parameter id 5");
}

// Written against the interfaces only: a schedule and a wrapper that know nothing of Lars.

void halve(fused_lars::LearningRate& optimizer) {
  optimizer.set_learning_rate(optimizer.learning_rate() / 2);
}

// Lookahead (Zhang, Lucas, Hinton, Ba 2019): every k steps of the inner optimizer, slow weights move a
// fraction alpha of the way to the fast ones, which start again from there.
class Lookahead : public fused_lars::StepOptimizer {
 public:
  Lookahead(std::unique_ptr<fused_lars::StepOptimizer> inner, int k, double alpha)
      : inner_(std::move(inner)), k_(k), alpha_(alpha) {}

  void step(int64_t parameter_id, const at::Tensor& weights, const at::Tensor& grad) override {
    const at::NoGradGuard no_grad;
    auto [entry, is_new] = slow_.try_emplace(parameter_id);
    if (is_new) entry->second = {weights.clone(), 0};
    inner_->step(parameter_id, weights, grad);
    auto& [slow, steps] = entry->second;
    if (++steps % k_ != 0) return;
    slow.add_(weights - slow, alpha_);
    weights.copy_(slow);
  }
  void step_graph_node(at::TensorList graph, int64_t node) override {
    if (graph.at(node).requires_grad()) step(node, graph[node], graph[node].grad());
  }
  void clear_state() override {
    slow_.clear();
    inner_->clear_state();
  }

 private:
  std::unique_ptr<fused_lars::StepOptimizer> inner_;
  int k_;
  double alpha_;
  std::map<int64_t, std::pair<at::Tensor, int>> slow_;
};

TEST(Interfaces, AScheduleAndALookaheadAreWrittenAgainstThem) {
  auto lars = std::make_unique<Lars>(with_everything());
  auto plain = with_everything();
  auto* schedule = lars.get();
  Lookahead lookahead(std::move(lars), /*k=*/2, /*alpha=*/0.5);
  std::vector<torch::Tensor> graph{leaf(1)};
  auto fast = graph[0].detach().clone();
  const auto start = fast.clone();
  for (int step = 0; step < 2; ++step) {
    graph[0].mutable_grad() = random_tensor({3, 4}, 2 + step);
    lookahead.step_graph_node(graph, 0);
    plain.step(0, fast, graph[0].grad());
    halve(*schedule);
    halve(plain);
  }
  EXPECT_EQ(schedule->learning_rate(), 0.125);
  EXPECT_TRUE(same_bits(graph[0].detach(), start + (fast - start) * 0.5));
  lookahead.clear_state();
  EXPECT_CONTAINS(printed(*schedule), "states=0");
}

// Run under ThreadSanitizer by `make sanitize`.
TEST(Threads, DistinctInstancesRunAtTheSameTime) {
  constexpr int kThreads = 4;
  const auto train = [](int seed) {
    auto lars = with_everything();
    auto weights = random_tensor({40, 30}, seed), bias = random_tensor({30}, seed + 1);
    for (int step = 0; step < 20; ++step) {
      const auto grad = random_tensor({40, 30}, seed + step);
      lars.step(0, weights, grad);
      lars.step_all({1}, {bias}, {grad[0]});
      lars.set_learning_rate(lars.learning_rate() * 0.9);
      if (step == 10) lars = Lars(lars);
    }
    return weights;
  };
  std::vector<torch::Tensor> results(kThreads);
  std::vector<std::thread> threads;
  for (int i = 0; i < kThreads; ++i) threads.emplace_back([&, i] { results[i] = train(100 * i); });
  for (auto& thread : threads) thread.join();
  for (int i = 0; i < kThreads; ++i) EXPECT_TRUE(same_bits(results[i], train(100 * i))) << i;
}

TEST(Threads, AnInstanceMovesFromThreadToThread) {
  auto lars = with_everything(), alone = with_everything();
  auto weights = random_tensor({40}, 1), same = weights.clone();
  for (int step = 0; step < 4; ++step) {
    const auto grad = random_tensor({40}, 2 + step);
    std::thread([moved = std::move(lars), &lars, &weights, &grad]() mutable {
      moved.step(0, weights, grad);
      lars = std::move(moved);
    }).join();
    alone.step(0, same, grad);
  }
  EXPECT_TRUE(same_bits(weights, same));
  EXPECT_EQ(printed(lars), printed(alone));
}

}  // namespace
