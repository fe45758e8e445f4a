#pragma once

// Random bits for a tile, in the registers of the threads that round its elements.

#include <cstdint>

#include "../csrc/rounding.h"

namespace fused_lars {

constexpr int kWorkers = 224;  // threads; with the dispatcher's warp a block has 256
constexpr int kVectorsPerThread = 4;

// 16 random bits for each element of the calling thread. Its k-th vector are the kVector elements of the tile
// from (k * kWorkers + threadIdx.x) * kVector on.
template <int kVector>
class RandomVectors {
 public:
  // rng.first_element is that of the tile. Called by whole warps.
  __device__ __forceinline__ void draw(const RngState& rng, RoundedTensor tensor) {
    if (rng.first_element % kElementsPerDraw != 0) {
      draw_across(rng, tensor);
    } else if constexpr (kVector == kElementsPerDraw) {
      draw_whole(rng, tensor);
    } else {
      draw_in_pairs(rng, tensor);
    }
  }

  __device__ __forceinline__ uint32_t of(int k, int e) const {
    return words_[k][e / 2] >> (e % 2 * 16) & 0xffff;
  }

 private:
  static constexpr int kWords = kVector / 2;

  // The index of the first element of the k-th vector.
  static __device__ __forceinline__ uint64_t index(const RngState& rng, uint32_t k) {
    return static_cast<uint64_t>(rng.first_element) + (k * kWorkers + threadIdx.x) * kVector;
  }

  __device__ __forceinline__ void draw_whole(const RngState& rng, RoundedTensor tensor) {
#pragma unroll
    for (int k = 0; k < kVectorsPerThread; ++k) {
      const RandomBits drawn = draw_bits(rng, tensor, index(rng, k) / kElementsPerDraw);
#pragma unroll
      for (int i = 0; i < kWords; ++i) words_[k][i] = drawn.words[i];
    }
  }

  // Two threads have the halves of a draw. The even one draws for vectors 0 and 2 of both, the odd one for
  // vectors 1 and 3.
  __device__ __forceinline__ void draw_in_pairs(const RngState& rng, RoundedTensor tensor) {
    static_assert(2 * kVector == kElementsPerDraw);
    const bool is_odd = threadIdx.x % 2 != 0;
#pragma unroll
    for (int k = 0; k < kVectorsPerThread; k += 2) {
      const RandomBits drawn = draw_bits(rng, tensor, index(rng, k + is_odd) / kElementsPerDraw);
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        const uint32_t low = drawn.words[i], high = drawn.words[kWords + i];
        const uint32_t received = __shfl_xor_sync(~0u, is_odd ? low : high, 1);
        words_[k][i] = is_odd ? received : low;
        words_[k + 1][i] = is_odd ? high : received;
      }
    }
  }

  // A shard may begin anywhere, so a vector may have elements of two draws.
  __device__ __forceinline__ void draw_across(const RngState& rng, RoundedTensor tensor) {
#pragma unroll
    for (int k = 0; k < kVectorsPerThread; ++k) {
      const uint64_t first = index(rng, k), draw = first / kElementsPerDraw;
      const auto skipped = static_cast<uint32_t>(first % kElementsPerDraw);
      const RandomBits low = draw_bits(rng, tensor, draw);
      RandomBits high = {};
      if (skipped + kVector > kElementsPerDraw) high = draw_bits(rng, tensor, draw + 1);
      uint32_t words[8];
#pragma unroll
      for (int i = 0; i < 4; ++i) words[i] = low.words[i], words[4 + i] = high.words[i];
      // Shifts by constants. An index that is not known to the compiler would put the words in local memory.
#pragma unroll
      for (int i = 0; i < 6; ++i) words[i] = skipped & 4 ? words[i + 2] : words[i];
#pragma unroll
      for (int i = 0; i < 5; ++i) words[i] = skipped & 2 ? words[i + 1] : words[i];
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        words_[k][i] = skipped & 1 ? words[i] >> 16 | words[i + 1] << 16 : words[i];
      }
    }
  }

  uint32_t words_[kVectorsPerThread][kWords];
};

}  // namespace fused_lars
