#pragma once

// What a block has to know of an item: where its tile lies, what to do with it, and by which factors.

#include "parameters.h"
#include "tile.cuh"

namespace fused_lars {

// An item, looked up. Made by one thread, read by all.
template <typename Types>
struct Work {
  Tile<Types> tile;
  WorkItem item;
  uint32_t tiles;  // of the tensor
  // Words, not bools: the compiler may load four bools as one vector, of which some were never written.
  uint32_t has_decayed_norm;
  uint32_t takes_norms;  // as every norm item does

  DecayedGradient<typename Types::Compute> decayed_gradient;  // where its norm is taken

  __device__ __forceinline__ NormOf<typename Types::Compute> norm_of() const {
    NormOf<typename Types::Compute> of = {has_decayed_norm != 0, {}};
    if (of.decayed) of.factors = decayed_gradient;
    return of;
  }
};

__device__ __forceinline__ double grad_scale(const Parameters& p) {
  return p.grad_scale == nullptr ? 1.0 : *p.grad_scale;
}

__device__ __forceinline__ bool has_norm_items(const Parameters& p, uint32_t tensor) {
  return p.items_before(tensor + 1).norms != p.items_before(tensor).norms;
}

// Writes straight into shared memory. A Work that is returned by value would occupy registers.
template <typename Types>
__device__ __forceinline__ void look_up(const Parameters& p, const WorkItem& item, Work<Types>& work) {
  const TensorRow row = p.tensor(item.tensor);
  const ItemCounts begin = p.items_before(item.tensor), end = p.items_before(item.tensor + 1);
  const uint32_t norm_items = end.norms - begin.norms;
  const uint32_t tiles = norm_items != 0 ? norm_items : end.updates - begin.updates;
  work.item = item;
  work.tiles = tiles;
  // A tensor whose norms are needed and which has no norm items has one tile.
  const Hyperparameters& group = p.group(row.group).hyperparameters;
  work.takes_norms = !item.is_update || (norm_items == 0 && p.pass == Pass::step &&
                                         (group.layer_adaptation || p.layer_norms != nullptr));
  work.has_decayed_norm = group.decayed_norm;
  if (group.decayed_norm) {
    work.decayed_gradient = decayed_gradient<typename Types::Compute>(group, grad_scale(p));
  }

  const uint64_t offset = static_cast<uint64_t>(item.tile) * Types::kTile;
  auto& tile = work.tile;
  uint32_t misaligned = 0;
  const auto locate = [&](auto* tensor, uint32_t bit) {
    if (reinterpret_cast<uintptr_t>(tensor) % (sizeof(*tensor) * Types::kVector) != 0) misaligned |= bit;
    return tensor + offset;
  };
  tile.weight = locate(static_cast<typename Types::Weight*>(row.weight), tile.kWeight);
  tile.grad = locate(static_cast<const typename Types::Grad*>(row.grad), tile.kGrad);
  tile.momentum_buffer = nullptr;
  if (row.momentum_buffer != nullptr) {
    tile.momentum_buffer =
        locate(static_cast<typename Types::MomentumBuffer*>(row.momentum_buffer), tile.kMomentumBuffer);
  }
  tile.param = nullptr;
  tile.master_follows = p.masters_follow;
  if constexpr (Types::kHasMaster) {
    tile.param = locate(p.pointer<typename Types::Param>(p.params_of_masters, item.tensor), tile.kParam);
  }
  if constexpr (Types::kHasCodes) {
    tile.momentum_scale = p.pointer<float>(p.momentum_scales, item.tensor) + offset / kScaleBlock;
  }
  if constexpr (Types::kMayRound) {
    const auto* rng = p.pointer<const int64_t>(p.rng_states, item.tensor);
    tile.rounds_weight = rng != nullptr && group.stochastic_rounding;
    tile.rng = {};
    if (rng != nullptr) tile.rng = {rng[0], rng[1], rng[2] + static_cast<int64_t>(offset)};
  }
  tile.count = item.tile + 1 == tiles ? row.last_tile : Types::kTile;
  tile.misaligned = misaligned;
}

__device__ __forceinline__ double learning_rate(const GroupRow& group) {
  if (group.lr == nullptr) return group.hyperparameters.lr;
  switch (group.lr_element) {
    case Element::f64:
      return *static_cast<const double*>(group.lr);
    case Element::f16:
      return __half2float(*static_cast<const __half*>(group.lr));
    case Element::bf16:
      return __bfloat162float(*static_cast<const __nv_bfloat16*>(group.lr));
    default:
      return *static_cast<const float*>(group.lr);
  }
}

__device__ __forceinline__ double trust_ratio(const Parameters& p, uint32_t tensor, Sums<double> norms) {
  const GroupRow& group = p.group(p.tensor(tensor).group);
  return trust_ratio(group.hyperparameters, learning_rate(group), norms.weight, norms.grad, grad_scale(p));
}

__device__ __forceinline__ void record_norms(const Parameters& p, uint32_t tensor, Sums<double> norms) {
  if (p.layer_norms == nullptr) return;
  const TensorRow& row = p.tensor(tensor);
  double* record = p.layer_norms + 2 * static_cast<size_t>(row.index);
  record[0] = norms.weight;
  record[1] = unscaled_grad_norm(p.group(row.group).hyperparameters, norms.grad, grad_scale(p));
}

// The trust ratio of a tensor whose norms are given, or that has no need of norms.
__device__ __forceinline__ double trust_ratio_without_norms(const Parameters& p, const WorkItem& item) {
  Sums<double> given = {0.0, 0.0};
  if (p.pass == Pass::update) {
    const double* row = p.squared_norms + 2 * static_cast<size_t>(p.tensor(item.tensor).index);
    given = {sqrt(row[0]), sqrt(row[1])};
    if (item.tile == 0) record_norms(p, item.tensor, given);
  }
  return trust_ratio(p, item.tensor, given);
}

// What the elements of a tile are multiplied by in its update; records q where that is asked for.
template <typename Types>
__device__ __forceinline__ Coefficients<typename Types::Compute> update_coefficients(const Parameters& p,
                                                                                     const WorkItem& item,
                                                                                     double q) {
  const TensorRow& row = p.tensor(item.tensor);
  const GroupRow& group = p.group(row.group);
  if (p.trust_ratios != nullptr && item.tile == 0) p.trust_ratios[row.index] = q;
  const auto* step = p.pointer<const float>(p.steps, item.tensor);
  return coefficients<typename Types::Compute>(group.hyperparameters, learning_rate(group), q, grad_scale(p),
                                               /*first_step=*/step != nullptr && *step == 0.0f);
}

}  // namespace fused_lars
