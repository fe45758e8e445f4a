// The fused step on the CPU.
//
// Tensors are cut into tiles of a fixed size. The sum of squares of a tensor is the sum of its tiles' sums,
// added in the order of the tiles. So its bits do not depend on the number of threads.
//
// Tensors are processed in batches about as large as the caches. A thread first takes the norms of a run of
// tiles. Once the trust ratios of the batch are known, it updates the same run backwards, since its cache
// holds what it read last. If a batch fits in the caches, its weights and gradients are read from memory
// once. An fp32 element then costs 20 bytes instead of 28.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include "../norm_range.h"
#include "../step.h"
#include "tile_kernels.h"

namespace fused_lars {
namespace {

constexpr int64_t kTile = 4096;                    // elements
constexpr int64_t kTilesPerThread = 8;             // fewer are not worth a thread
constexpr int64_t kTilesPerStretch = 16;           // 512 KiB of fp32 weights and gradients
constexpr int64_t kCacheBytesPerThread = 1 << 20;  // of weights and gradients; half of a common L2

ElementPointer pointer(const at::Tensor& tensor) {
  return tensor.defined() ? ElementPointer{tensor.data_ptr(), element(tensor)} : ElementPointer();
}

TensorPointers pointers(const StepTensor& tensor, const Hyperparameters& group) {
  TensorPointers pointers{
      .weight = pointer(tensor.weight()),
      .grad = pointer(tensor.grad),
      .momentum_buffer = pointer(tensor.momentum_buffer),
      .low_precision = pointer(tensor.master_param.defined() ? tensor.param : at::Tensor())};
  if (tensor.momentum_scale.defined()) {
    pointers.momentum_scale = tensor.momentum_scale.mutable_data_ptr<float>();
  }
  if (tensor.rng_state.defined()) {
    std::memcpy(&pointers.rng, tensor.rng_state.const_data_ptr(), sizeof(RngState));
    const auto weight = tensor.weight().scalar_type();
    pointers.rounds_weight_stochastically = rounds_weight_stochastically(group, weight);
    pointers.rounds_momentum_stochastically =
        tensor.momentum_buffer.defined() &&
        rounds_momentum_stochastically(group, weight, tensor.momentum_buffer.scalar_type());
  }
  return pointers;
}

int64_t tiles_of(int64_t numel) { return (numel + kTile - 1) / kTile; }

// The sums of squares of a weight and a gradient whose elements were multiplied by `scale`.
struct ScaledNorms {
  SquaredNorms squared;
  SquaredNorms scale = {1.0, 1.0};

  double weight_norm() const { return std::sqrt(squared.weight) / scale.weight; }
  double grad_norm() const { return std::sqrt(squared.grad) / scale.grad; }
  // Two divisions, because the square of a scale could overflow where the result does not.
  double weight_squared() const { return squared.weight / scale.weight / scale.weight; }
  double grad_squared() const { return squared.grad / scale.grad / scale.grad; }
};

// One parameter of a batch.
struct Work {
  TensorPointers tensors;
  int64_t numel;
  int64_t first_tile;  // within the batch
  int64_t index;       // within the call
  bool needs_norms;
  std::optional<DecayedGradient<double>> decayed;  // with decayed_norm
  // Set once the norms are known. in_f64() tells which of the two the update uses.
  Coefficients<float> f32;
  Coefficients<double> f64;

  DecayedNorm decayed_norm() const { return decayed ? &*decayed : nullptr; }

  bool in_f64() const { return tensors.weight.element == Element::f64; }
};

// Consecutive parameters that are processed together.
class Batch {
 public:
  void add(const StepTensor& tensor, int64_t index, bool needs_norms, const Hyperparameters& group,
           double grad_scale) {
    const int64_t numel = tensor.param.numel();
    Work& work = work_.emplace_back();
    work.tensors = pointers(tensor, group);
    work.numel = numel;
    work.first_tile = tiles_;
    work.index = index;
    work.needs_norms = needs_norms;
    if (group.decayed_norm) work.decayed = decayed_gradient<double>(group, grad_scale);
    tiles_ += tiles_of(numel);
    bytes_ += numel * static_cast<int64_t>(tensor.weight().element_size() + tensor.grad.element_size());
    any_norms_ |= needs_norms;
  }
  bool full() const { return bytes_ >= kCacheBytesPerThread * at::get_num_threads(); }
  void clear() {
    work_.clear();
    tiles_ = bytes_ = 0;
    any_norms_ = false;
  }
  std::vector<Work>& work() { return work_; }

  // The norms of each parameter of the batch, in the order of work(). Those that are not needed are 0.
  const std::vector<ScaledNorms>& norms() {
    norms_.assign(work_.size(), {});
    if (!any_norms_) return norms_;
    partials_.assign(tiles_, {});
    const auto& kernels = tile_kernels();
    for_tiles([&](const Work& work, int64_t tile, int64_t offset, int64_t count) {
      if (!work.needs_norms) return;
      const auto norms = work.in_f64() ? kernels.squared_norms_f64 : kernels.squared_norms_f32;
      partials_[work.first_tile + tile] =
          norms(work.tensors.weight, work.tensors.grad, work.decayed_norm(), offset, count);
    });
    bool any_scaled = false;
    for (size_t k = 0; k < work_.size(); ++k) {
      ScaledNorms& norms = norms_[k];
      norms.squared = add_partials(work_[k]);
      if (!work_[k].needs_norms) continue;
      norms.scale = {scale_of(work_[k], norms.squared.weight), scale_of(work_[k], norms.squared.grad)};
      any_scaled |= norms.scale.weight != 1.0 || norms.scale.grad != 1.0;
    }
    if (any_scaled) take_scaled_norms();
    return norms_;
  }

  // Calls f(work, tile, offset, count) for every tile of the batch, in parallel. A thread gets the same run
  // of tiles in every call. If `reversed`, it starts at the end of its run and goes back stretch by stretch.
  // Within a stretch it goes forwards, as the processor's prefetching needs.
  template <typename F>
  void for_tiles(F f, bool reversed = false) const {
    at::parallel_for(0, tiles_, kTilesPerThread, [&](int64_t begin, int64_t end) {
      const int64_t stretch = reversed ? kTilesPerStretch : end - begin;
      for (int64_t done = 0; done < end - begin; done += stretch) {
        const int64_t first = reversed ? std::max(begin, end - done - stretch) : begin;
        const int64_t last = end - done;
        const auto after = [](int64_t tile, const Work& work) { return tile < work.first_tile; };
        auto work = std::upper_bound(work_.begin(), work_.end(), first, after) - 1;
        for (int64_t k = first; k < last; ++k) {
          while (k - work->first_tile >= tiles_of(work->numel)) ++work;
          const int64_t tile = k - work->first_tile;
          const int64_t offset = tile * kTile;
          f(*work, tile, offset, std::min(kTile, work->numel - offset));
        }
      }
    });
  }

 private:
  static double scale_of(const Work& work, double sum) {
    const auto count = static_cast<double>(work.numel);
    return work.in_f64() ? square_scale<double>(sum, count) : square_scale<float>(sum, count);
  }

  SquaredNorms add_partials(const Work& work) const {
    SquaredNorms sum;
    for (int64_t t = work.first_tile; t < work.first_tile + tiles_of(work.numel); ++t) {
      sum.weight += partials_[t].weight;
      sum.grad += partials_[t].grad;
    }
    return sum;
  }

  // Takes the sums again whose scale is not 1. The others stay.
  void take_scaled_norms() {
    const auto& kernels = tile_kernels();
    const auto norms_of = [&](const Work& work) -> ScaledNorms& { return norms_[&work - work_.data()]; };
    for_tiles([&](const Work& work, int64_t tile, int64_t offset, int64_t count) {
      const SquaredNorms& scale = norms_of(work).scale;
      if (scale.weight == 1.0 && scale.grad == 1.0) return;
      const auto norms = work.in_f64() ? kernels.scaled_squared_norms_f64 : kernels.scaled_squared_norms_f32;
      partials_[work.first_tile + tile] = norms(work.tensors.weight, work.tensors.grad, work.decayed_norm(),
                                                offset, count, scale.weight, scale.grad);
    });
    for (const Work& work : work_) {
      ScaledNorms& norms = norms_of(work);
      const SquaredNorms sum = add_partials(work);
      if (norms.scale.weight != 1.0) norms.squared.weight = sum.weight;
      if (norms.scale.grad != 1.0) norms.squared.grad = sum.grad;
    }
  }

  std::vector<Work> work_;
  std::vector<SquaredNorms> partials_;
  std::vector<ScaledNorms> norms_;
  int64_t tiles_ = 0;
  int64_t bytes_ = 0;
  bool any_norms_ = false;
};

double scalar_or(const at::Tensor& tensor, double otherwise) {
  return tensor.defined() ? *tensor.const_data_ptr<float>() : otherwise;
}

}  // namespace

void step_cpu(const Step& step) {
  if (scalar_or(step.found_inf, 0.0) != 0.0) return;
  if (step.masters_follow) {
    for (const auto& tensor : step.tensors) {
      if (tensor.master_param.defined()) take_over(tensor.param, tensor.master_param);
    }
  }
  const double grad_scale = scalar_or(step.grad_scale, 1.0);
  const double* given = step.squared_norms.defined() ? step.squared_norms.const_data_ptr<double>() : nullptr;
  double* trust_ratios = step.trust_ratios.defined() ? step.trust_ratios.mutable_data_ptr<double>() : nullptr;
  double* layer_norms = step.layer_norms.defined() ? step.layer_norms.mutable_data_ptr<double>() : nullptr;
  const auto& kernels = tile_kernels();

  const auto prepare = [&](Work& work, const ScaledNorms& norms) {
    const int64_t i = work.index;
    const auto& tensor = step.tensors[i];
    const auto& group = step.groups[tensor.group];
    const double q = trust_ratio(group, group.lr, norms.weight_norm(), norms.grad_norm(), grad_scale);
    if (trust_ratios) trust_ratios[i] = q;
    if (layer_norms) {
      layer_norms[2 * i] = norms.weight_norm();
      layer_norms[2 * i + 1] = unscaled_grad_norm(group, norms.grad_norm(), grad_scale);
    }
    bool first_step = false;
    if (tensor.step.defined()) {
      float& applied = *tensor.step.mutable_data_ptr<float>();
      first_step = applied == 0.0f;
      applied += 1.0f;
    }
    if (tensor.rng_state.defined()) ++tensor.rng_state.mutable_data_ptr<int64_t>()[1];
    work.f32 = coefficients<float>(group, group.lr, q, grad_scale, first_step);
    work.f64 = coefficients<double>(group, group.lr, q, grad_scale, first_step);
  };
  const auto update = [&](const Work& work, int64_t, int64_t offset, int64_t count) {
    if (work.in_f64()) {
      kernels.update_f64(work.f64, work.tensors, offset, count);
    } else {
      kernels.update_f32(work.f32, work.tensors, offset, count);
    }
  };

  Batch batch;
  const auto flush = [&] {
    const auto& norms = batch.norms();
    for (size_t k = 0; k < norms.size(); ++k) {
      Work& work = batch.work()[k];
      const int64_t i = work.index;
      prepare(work, given ? ScaledNorms{{given[2 * i], given[2 * i + 1]}} : norms[k]);
    }
    batch.for_tiles(update, /*reversed=*/true);
    batch.clear();
  };
  for (size_t i = 0; i < step.tensors.size(); ++i) {
    const auto& tensor = step.tensors[i];
    const auto& group = step.groups[tensor.group];
    batch.add(tensor, static_cast<int64_t>(i),
              /*needs_norms=*/!given && (layer_norms || group.layer_adaptation), group, grad_scale);
    if (batch.full()) flush();
  }
  flush();
}

at::Tensor squared_norms_cpu(const NormCall& call) {
  const auto count = static_cast<int64_t>(call.params.size());
  auto result = at::empty({count, 2}, at::TensorOptions().dtype(at::kDouble));
  double* out = result.mutable_data_ptr<double>();
  const double grad_scale = scalar_or(call.grad_scale, 1.0);
  Batch batch;
  for (int64_t i = 0; i < count; ++i) {
    StepTensor tensor;  // without state, for norms alone
    tensor.param = call.params[i];
    tensor.grad = call.grads[i];
    batch.add(tensor, i, /*needs_norms=*/true, call.groups[call.group_of[i]], grad_scale);
  }
  const auto& norms = batch.norms();
  for (size_t i = 0; i < norms.size(); ++i) {
    out[2 * i] = norms[i].weight_squared();
    out[2 * i + 1] = norms[i].grad_squared();
  }
  return result;
}

}  // namespace fused_lars
