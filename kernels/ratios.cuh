#pragma once

// How blocks agree on a tensor's trust ratio: each counts its norm items, and the last one publishes the
// ratio.

#include <cuda/atomic>

#include "norms.cuh"
#include "work.cuh"

namespace fused_lars {

template <typename T>
using DeviceAtomic = cuda::atomic_ref<T, cuda::thread_scope_device>;

// A trust ratio in the workspace. A ratio is never negative, so its sign bit can mark it as published. All
// bits are zero until then.
__device__ __forceinline__ uint64_t encode_ratio(double q) { return __double_as_longlong(q) | 1ull << 63; }
__device__ __forceinline__ double decode_ratio(uint64_t bits) {
  return __longlong_as_double(bits & ~(1ull << 63));
}

// Counts a norm item as done, given its partials. The last one of a tensor completes its norms. Called by all
// lanes of a warp.
template <typename Types>
__device__ __forceinline__ void count_norm_item(const Parameters& p, const Work<Types>& work,
                                                Sums<double> partial) {
  const uint32_t lane = threadIdx.x % 32, tensor = work.item.tensor;
  Sums<double>* partials = p.workspace.partials + p.items_before(tensor).norms;
  uint32_t& counter = p.workspace.norm_items[tensor];
  uint32_t done = 0;
  if (lane == 0) {
    partials[work.item.tile] = partial;
    done = 1 + DeviceAtomic<uint32_t>(counter).fetch_add(1, cuda::memory_order_acq_rel);
  }
  if (__shfl_sync(~0u, done, 0) != work.tiles) return;
  __syncwarp();

  // Lane l adds tiles l, l + 32, ...; then the lanes' sums are added in a fixed order.
  constexpr bool kMayBeNorms = std::is_same_v<typename Types::Compute, double>;
  Sums<double> total = {0.0, 0.0};
  bool any_norm = false;
  constexpr uint32_t kAhead = 12;  // loads under way: updates wait for their latency
  for (uint32_t first = lane; first < work.tiles; first += 32 * kAhead) {
    Sums<double> loaded[kAhead];
#pragma unroll
    for (uint32_t k = 0; k < kAhead; ++k) {
      const uint32_t tile = first + 32 * k;
      loaded[k] = tile < work.tiles ? partials[tile] : Sums<double>{};
    }
#pragma unroll
    for (Sums<double> add : loaded) {
      if (kMayBeNorms && (add.weight < 0.0 || add.grad < 0.0)) {
        any_norm = true;
        add = {add.weight < 0.0 ? 0.0 : add.weight, add.grad < 0.0 ? 0.0 : add.grad};
      }
      total.weight += add.weight;
      total.grad += add.grad;
    }
  }
  __syncwarp();
  total = {warp_sum(total.weight), warp_sum(total.grad)};
  Sums<double> norms = {sqrt(total.weight), sqrt(total.grad)};
  if (kMayBeNorms && __any_sync(~0u, any_norm)) {
    const Sums<double> mixed = {norm_of_mixed_partials(&partials->weight, work.tiles),
                                norm_of_mixed_partials(&partials->grad, work.tiles)};
    // Else an element is inf or NaN, and so are they.
    if (isfinite(norms.weight)) norms.weight = mixed.weight, total.weight = mixed.weight * mixed.weight;
    if (isfinite(norms.grad)) norms.grad = mixed.grad, total.grad = mixed.grad * mixed.grad;
  }
  __syncwarp();
  if (lane == 0) {
    counter = 0;
    if (p.pass == Pass::norms) {
      double* row = p.squared_norms + 2 * static_cast<size_t>(p.tensor(tensor).index);
      row[0] = total.weight;
      row[1] = total.grad;
    } else {
      const uint64_t ratio = encode_ratio(trust_ratio(p, tensor, norms));
      DeviceAtomic<uint64_t>(p.workspace.ratios[tensor]).store(ratio, cuda::memory_order_release);
      record_norms(p, tensor, norms);
    }
  }
  for (uint32_t tile = lane; tile < work.tiles; tile += 32) partials[tile] = {};
}

}  // namespace fused_lars
