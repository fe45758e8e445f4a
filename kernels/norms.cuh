#pragma once

// From a tile's sums of squares to a tensor's norms, over the whole range of the element type.
//
// A tile whose plain sum is out of range is summed again, scaled. Its partial is a sum of squares
// nevertheless where double holds that, which is always so for elements of float. Else it is the norm, made
// negative.

#include "../csrc/norm_range.h"
#include "tile.cuh"

namespace fused_lars {

// A partial, from a sum of squares of elements that were multiplied by `scale`.
template <typename Compute>
__device__ __forceinline__ double encode_partial(Compute sum, double scale) {
  if (scale == 1.0) return sum;
  if constexpr (std::is_same_v<Compute, float>) {
    return sum / (scale * scale);
  } else {
    return isfinite(sum) ? -(sqrt(sum) / scale) : sum;
  }
}

// The norm of what a partial, or a sum of those that are not negative, stands for.
__device__ __forceinline__ double decode_norm(double partial) {
  return partial < 0.0 ? -partial : sqrt(partial);
}

// A tile's partials, given its plain sums, in all lanes of the calling warp. A sum is 0 only if all elements
// are: squared_sums_of_warp sees to that.
template <typename Types>
__device__ __forceinline__ Sums<double> tile_partials(const Tile<Types>& tile,
                                                      Sums<typename Types::Compute> sums,
                                                      NormOf<typename Types::Compute> of) {
  using Compute = typename Types::Compute;
  const auto scale_of = [](Compute sum) { return sum == 0 ? 1.0 : square_scale<Compute>(sum, Types::kTile); };
  const Sums<double> scale = {scale_of(sums.weight), scale_of(sums.grad)};
  if (scale.weight != 1.0 || scale.grad != 1.0) {
    const Sums<Compute> scaled = TileAgent<Types>::scaled_squared_sums(
        tile, {static_cast<Compute>(scale.weight), static_cast<Compute>(scale.grad)}, of);
    if (scale.weight != 1.0) sums.weight = scaled.weight;
    if (scale.grad != 1.0) sums.grad = scaled.grad;
  }
  return {encode_partial(sums.weight, scale.weight), encode_partial(sums.grad, scale.grad)};
}

// The norm of a tensor that has partials of both kinds, in all lanes of the calling warp: every second number
// of `partials`.
inline __device__ __noinline__ double norm_of_mixed_partials(const double* partials, uint32_t tiles) {
  double largest = 0.0;
  for (uint32_t tile = threadIdx.x % 32; tile < tiles; tile += 32) {
    largest = fmax(largest, decode_norm(partials[2 * tile]));
  }
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    largest = fmax(largest, __shfl_xor_sync(~0u, largest, lanes));
  }
  if (largest == 0.0) return 0.0;
  double sum = 0.0;
  for (uint32_t tile = threadIdx.x % 32; tile < tiles; tile += 32) {
    const double ratio = decode_norm(partials[2 * tile]) / largest;
    sum += ratio * ratio;
  }
  return largest * sqrt(warp_sum(sum));
}

}  // namespace fused_lars
