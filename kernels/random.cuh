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
    if (rng.first_element % kElementsPerDraw == 0) {
      draw_together(rng, tensor);
    } else {
      draw_across(rng, tensor);
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

  // Neighbouring threads share the draw of each of their vectors. So each of them draws for some of the
  // vectors, and they exchange what they have drawn.
  __device__ __forceinline__ void draw_together(const RngState& rng, RoundedTensor tensor) {
    constexpr uint32_t kThreadsOfDraw = kElementsPerDraw / kVector;
    static_assert(kVectorsPerThread % kThreadsOfDraw == 0);
    const uint32_t place = threadIdx.x % kThreadsOfDraw;
    // Which of the draw's elements the thread has: those of the second half take complements.
    const bool is_complement = place >= kThreadsOfDraw / 2;
    const bool is_upper = place % 2 != 0;  // if a thread has a quarter of a draw: of the words
#pragma unroll
    for (uint32_t group = 0; group < kVectorsPerThread; group += kThreadsOfDraw) {
      const RandomBits drawn = draw_bits(rng, tensor, index(rng, group + place) / kElementsPerDraw);
#pragma unroll
      for (uint32_t source = 0; source < kThreadsOfDraw; ++source) {
        uint32_t words[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) words[i] = __shfl_sync(~0u, drawn.words[i], source, kThreadsOfDraw);
#pragma unroll
        for (int i = 0; i < kWords; ++i) {
          const uint32_t word = kWords == 4 || !is_upper ? words[i] : words[(kWords + i) % 4];
          words_[group + source][i] = is_complement ? ~word : word;
        }
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
      uint32_t words[12];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        words[i] = low.words[i], words[4 + i] = ~low.words[i], words[8 + i] = high.words[i];
      // Shifts by constants. An index that is not known to the compiler would put the words in local memory.
#pragma unroll
      for (int i = 0; i < 8; ++i) words[i] = skipped & 8 ? words[i + 4] : words[i];
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
