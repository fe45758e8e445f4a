#pragma once

// What a block's workers do with one tile: load it into registers, sum its squares, keep it in shared memory,
// update it.
//
// Element e of a tile belongs to the same thread and is summed in the same place whether it is read by a
// vector access or alone, so alignment does not change a bit.

#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../csrc/rule.h"
#include "parameters.h"
#include "random.cuh"

namespace fused_lars {

constexpr int kWorkerWarps = kWorkers / 32;
constexpr int kVectorBytes = 16;

// The element types of a launch. The weight is what the rule reads and writes: the parameter, or its fp32
// master.
template <typename Param_, typename Grad_, typename MomentumBuffer_, typename Weight_ = Param_>
struct TensorTypes {
  using Param = Param_;
  using Grad = Grad_;
  using MomentumBuffer = MomentumBuffer_;
  using Weight = Weight_;
  using Compute = std::conditional_t<std::is_same_v<Weight, double>, double, float>;
  static constexpr bool kHasMaster = !std::is_same_v<Param, Weight>;
  static constexpr bool kHasCodes = std::is_same_v<MomentumBuffer, int8_t>;  // momentum as in rounding.h

  // What is rounded stochastically: see csrc/step.h. A group decides for weights of 16 bits and for momentum
  // of their type.
  static constexpr bool kWeightMayRound = sizeof(Weight) == 2;
  static constexpr bool kMomentumRoundsAsWeight = kWeightMayRound && sizeof(MomentumBuffer) == 2;
  static constexpr bool kMomentumRounds = kHasCodes || (!kWeightMayRound && sizeof(MomentumBuffer) == 2);
  static constexpr bool kMayRound = kWeightMayRound || kMomentumRounds;

  // Elements of a vector: the widest type is accessed by 16 bytes.
  static constexpr size_t kVector =
      kVectorBytes / std::max({sizeof(Weight), sizeof(Grad), sizeof(MomentumBuffer)});
  static constexpr uint32_t kTile = kWorkers * kVectorsPerThread * kVector;
  static constexpr uint32_t kStageBytes = kTile * (sizeof(Weight) + sizeof(Grad));
  static_assert(kTile % kScaleBlock == 0);
};

// Of an element of 8 or 16 bits.
template <typename T>
using Bits = std::conditional_t<sizeof(T) == 1, uint8_t, uint16_t>;
template <typename T>
__device__ __forceinline__ Bits<T> bits_of(T element) {
  Bits<T> bits;
  memcpy(&bits, &element, sizeof element);
  return bits;
}

// Rounds stochastically to __half or __nv_bfloat16, given 16 random bits.
template <typename T>
__device__ __forceinline__ Bits<T> rounded_bits(float x, uint32_t random) {
  if constexpr (std::is_same_v<T, __half>) {
    return round_to_f16(x, random);
  } else {
    return round_to_bf16(x, random);
  }
}

// Elements as one access reads and writes them. Those of 8 and 16 bits stay packed until they are used: a
// tile of them unpacked would not fit in registers.
template <typename T, int kVector>
struct Packed {
  static constexpr bool kIsSmall = sizeof(T) < sizeof(uint32_t);
  static constexpr int kPerWord = kIsSmall ? sizeof(uint32_t) / sizeof(T) : 1;
  using Word = std::conditional_t<kIsSmall, uint32_t, T>;
  static constexpr int kWords = kVector * sizeof(T) / sizeof(Word);
  alignas(kVector * sizeof(T)) Word words[kWords];

  __device__ __forceinline__ T get(int e) const {
    if constexpr (kIsSmall) {
      const auto bits = static_cast<Bits<T>>(words[e / kPerWord] >> shift(e));
      T element;
      memcpy(&element, &bits, sizeof element);
      return element;
    } else {
      return words[e];
    }
  }

  // Whether an element is not 0.
  __device__ __forceinline__ bool any() const {
    bool any = false;
#pragma unroll
    for (const Word word : words) {
      if constexpr (sizeof(T) == 2) {
        any |= (word & 0x7fff7fffu) != 0;
      } else {
        any |= word != 0;
      }
    }
    return any;
  }

  __device__ __forceinline__ void set(int e, T element) {
    if constexpr (kIsSmall) {
      set_bits(e, bits_of(element));
    } else {
      words[e] = element;
    }
  }

  // Of an element of 8 or 16 bits.
  __device__ __forceinline__ void set_bits(int e, Bits<T> bits) {
    const uint32_t other =
        words[e / kPerWord] & ~(static_cast<uint32_t>(static_cast<Bits<T>>(-1)) << shift(e));
    words[e / kPerWord] = other | static_cast<uint32_t>(bits) << shift(e);
  }

 private:
  static __device__ __forceinline__ int shift(int e) { return e % kPerWord * 8 * sizeof(T); }
};

// CUDA's vector of some words.
template <typename Word, int kWords>
struct AccessOf;
template <>
struct AccessOf<float, 4> {
  using Type = float4;
};
template <>
struct AccessOf<float, 2> {
  using Type = float2;
};
template <>
struct AccessOf<double, 2> {
  using Type = double2;
};
template <>
struct AccessOf<uint32_t, 4> {
  using Type = uint4;
};
template <>
struct AccessOf<uint32_t, 2> {
  using Type = uint2;
};
template <>
struct AccessOf<uint32_t, 1> {
  using Type = uint32_t;
};
template <typename P>
using Access = typename AccessOf<typename P::Word, P::kWords>::Type;

// kLast: this step does not read the element again, so L2 may evict it first. (On an H100 that made a step
// slower for tiles that are kept: their weights are written soon.)
template <bool kLast, typename T>
__device__ __forceinline__ T load_hinted(const T* from) {
  return kLast ? __ldcs(from) : __ldcg(from);
}

// Loads kVector elements, of which the first `inside` exist; the others become 0. One access does it if all
// exist and are aligned. Otherwise elements are loaded one by one through L1, because several of these
// accesses share a sector. L1 is never stale: no element is read after it was written in the same launch.
template <bool kLast, typename T, int kVector>
__device__ __forceinline__ void load(Packed<T, kVector>& to, const T* from, bool aligned, int inside) {
  using A = Access<Packed<T, kVector>>;
  if (aligned && inside >= kVector) {
    const A loaded = load_hinted<kLast>(reinterpret_cast<const A*>(from));
    memcpy(to.words, &loaded, sizeof loaded);
  } else {
#pragma unroll
    for (int e = 0; e < kVector; ++e) to.set(e, e < inside ? __ldca(from + e) : T(0.0f));
  }
}

template <typename T, int kVector>
__device__ __forceinline__ void store(const Packed<T, kVector>& from, T* to, bool aligned, int inside) {
  using A = Access<Packed<T, kVector>>;
  if (aligned && inside >= kVector) {
    A stored;
    memcpy(&stored, from.words, sizeof stored);
    __stcs(reinterpret_cast<A*>(to), stored);
  } else {
#pragma unroll
    for (int e = 0; e < kVector; ++e) {
      if (e < inside) __stcs(to + e, from.get(e));
    }
  }
}

// What a gradient's norm is taken of. By value: a pointer to the factors would put them in local memory.
template <typename Compute>
struct NormOf {
  bool decayed;  // the decayed gradient, else the gradient as stored
  DecayedGradient<Compute> factors;
};

// What a tile has only if its types need it. Other kernels spend no register on it.
template <bool kMayRound>
struct RoundingOfTile {};
template <>
struct RoundingOfTile<true> {
  RngState rng;  // its first element is the tile's
  uint32_t rounds_weight;
};
template <bool kHasCodes>
struct ScalesOfTile {};
template <>
struct ScalesOfTile<true> {
  float* momentum_scale;  // of its first block
};

// One tile of one tensor.
template <typename Types>
struct Tile : RoundingOfTile<Types::kMayRound>, ScalesOfTile<Types::kHasCodes> {
  typename Types::Weight* weight;
  const typename Types::Grad* grad;
  typename Types::MomentumBuffer* momentum_buffer;  // null without momentum
  typename Types::Param* param;                     // where the weight is its master
  uint32_t master_follows;                          // it takes over what was written into the parameter
  uint32_t count;                                   // elements
  uint32_t misaligned;                              // the pointers that may not be accessed by vectors
  enum : uint32_t { kWeight = 1, kGrad = 2, kMomentumBuffer = 4, kParam = 8 };
};

// In every lane, in one order for all of them.
template <typename T>
__device__ __forceinline__ T warp_sum(T x) {
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(~0u, x, lanes);
  return x;
}

// What of an element's bits a block's scale is made of: see block_scale.
__device__ __forceinline__ uint32_t magnitude_bits(float x) { return float_to_bits(x) & 0x7fffffff; }

// The blocks of int8 momentum in a tile. The k-th vectors of some neighbouring lanes are a block. These lanes
// have kVectorsPerThread blocks, and a quarter of them works out the scale of each.
template <int kVector>
struct LanesOfBlock {
  static_assert(kVectorsPerThread == 4);
  static constexpr int kLanes = kScaleBlock / kVector;
  static constexpr int kQuarter = kLanes / kVectorsPerThread;

  // For which k the calling lane works out the scale, and which one of the tile's blocks that is.
  static __device__ __forceinline__ uint32_t own() { return threadIdx.x / kQuarter % kVectorsPerThread; }
  static __device__ __forceinline__ uint32_t own_block() {
    return own() * (kWorkers / kLanes) + threadIdx.x / kLanes;
  }

  // The maximum of x[own()] over the lanes. With each exchange, a lane passes on what others work out.
  static __device__ __forceinline__ uint32_t max_of_own(const uint32_t (&x)[kVectorsPerThread]) {
    const bool upper_half = own() / 2 != 0, odd = own() % 2 != 0;
    uint32_t half[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      half[i] = max_with(upper_half ? x[i + 2] : x[i], upper_half ? x[i] : x[i + 2], 2 * kQuarter);
    }
    uint32_t largest = max_with(odd ? half[1] : half[0], odd ? half[0] : half[1], kQuarter);
#pragma unroll
    for (int lanes = kQuarter / 2; lanes > 0; lanes /= 2) largest = max_with(largest, largest, lanes);
    return largest;
  }

  // The k-th block's number, where x is the number of the own block.
  static __device__ __forceinline__ float of_block(int k, float x) {
    return __shfl_sync(~0u, x, k * kQuarter, kLanes);
  }

 private:
  // Gives `passed` to the lane that lies `lanes` away.
  static __device__ __forceinline__ uint32_t max_with(uint32_t kept, uint32_t passed, int lanes) {
    return max(kept, __shfl_xor_sync(~0u, passed, lanes));
  }
};

// The workers' hold on one tile.
template <typename Types>
class TileAgent {
  static constexpr int kVector = Types::kVector;
  using Compute = typename Types::Compute;
  static constexpr Compute kLeastNormal = std::numeric_limits<Compute>::min();
  using PackedWeight = Packed<typename Types::Weight, kVector>;
  using PackedGrad = Packed<typename Types::Grad, kVector>;

 public:
  template <bool kUpdate>
  __device__ __forceinline__ void load(const Tile<Types>& tile) {
    for_each_vector(tile, [&](int k, uint32_t first, int inside, uint32_t misaligned) {
      load_weight<kUpdate>(weight_[k], tile, first, inside, misaligned);
      fused_lars::load<kUpdate>(grad_[k], tile.grad + first, !(misaligned & tile.kGrad), inside);
      if (kUpdate) load_momentum(tile, k, first, inside, misaligned);
    });
  }

  // Writes weights and gradients to a stage in shared memory. A thread reads back what it wrote itself, so no
  // barrier is needed.
  __device__ __forceinline__ void keep(unsigned char* stage) const {
#pragma unroll
    for (int k = 0; k < kVectorsPerThread; ++k) {
      copy(weights_of(stage)[k * kWorkers + threadIdx.x], weight_[k]);
      copy(grads_of(stage)[k * kWorkers + threadIdx.x], grad_[k]);
    }
  }

  // Loads weights and gradients from a stage, and the momentum from its tensor.
  __device__ __forceinline__ void load_kept(const Tile<Types>& tile, unsigned char* stage) {
    for_each_vector(tile, [&](int k, uint32_t first, int inside, uint32_t misaligned) {
      load_momentum(tile, k, first, inside, misaligned);
    });
#pragma unroll
    for (int k = 0; k < kVectorsPerThread; ++k) {
      copy(weight_[k], weights_of(stage)[k * kWorkers + threadIdx.x]);
      copy(grad_[k], grads_of(stage)[k * kWorkers + threadIdx.x]);
    }
  }

  // Sums of squares of what the calling warp has loaded, in all of its lanes.
  __device__ __forceinline__ Sums<Compute> squared_sums_of_warp(NormOf<Compute> of) const {
    const Sums<Compute> sums =
        of.decayed ? squares_of_thread([=](Compute grad, Compute weight) { return of.factors(grad, weight); })
                   : squares_of_thread([](Compute grad, Compute) { return grad; });
    Sums<Compute> of_warp = {warp_sum(sums.weight), warp_sum(sums.grad)};
    // A sum whose squares have all underflowed becomes the least number. So it is not taken for that of
    // zeros, and the tile is summed again. To sum tiles of zeros again would take long: an embedding has
    // many.
    if (of_warp.weight == 0 || of_warp.grad == 0) {
      bool any_weight = false, any_grad = false;
#pragma unroll
      for (const auto& weight : weight_) any_weight |= weight.any();
#pragma unroll
      for (const auto& grad : grad_) any_grad |= grad.any();
      any_weight = __any_sync(~0u, any_weight);
      any_grad = __any_sync(~0u, any_grad || (of.decayed && any_weight));
      if (of_warp.weight == 0 && any_weight) of_warp.weight = kLeastNormal;
      if (of_warp.grad == 0 && any_grad) of_warp.grad = kLeastNormal;
    }
    return of_warp;
  }

  // The same sums of elements that are multiplied by `scale`, in each lane of the calling warp. This warp
  // alone knows that the plain sums were out of range, so it reads the whole tile again.
  static __device__ __forceinline__ Sums<Compute> scaled_squared_sums(const Tile<Types>& tile,
                                                                      Sums<Compute> scale,
                                                                      NormOf<Compute> of) {
    Sums<Compute> sums = {};
    const DecayedGradient<Compute> scaled = {of.factors.grad_gain * scale.grad,
                                             of.factors.weight_decay * scale.grad};
    for (uint32_t first = threadIdx.x % 32 * kVector; first < tile.count; first += 32 * kVector) {
      PackedWeight weights;
      PackedGrad grads;
      const int inside = static_cast<int>(tile.count - first);
      load_weight<false>(weights, tile, first, inside, tile.misaligned);
      fused_lars::load<false>(grads, tile.grad + first, !(tile.misaligned & tile.kGrad), inside);
#pragma unroll
      for (int e = 0; e < kVector; ++e) {
        const auto stored_weight = static_cast<Compute>(weights.get(e));
        const auto stored_grad = static_cast<Compute>(grads.get(e));
        const Compute weight = stored_weight * scale.weight;
        // An infinite weight must not make the norm of a plain gradient NaN.
        const Compute grad = of.decayed ? scaled(stored_grad, stored_weight) : stored_grad * scale.grad;
        sums.weight = fma(weight, weight, sums.weight);
        sums.grad = fma(grad, grad, sums.grad);
      }
    }
    return {warp_sum(sums.weight), warp_sum(sums.grad)};
  }

  // Applies the rule to the loaded tile and stores it. Random bits are drawn before loaded elements are used,
  // so that drawing hides the latency of loads.
  __device__ __forceinline__ void update(const Tile<Types>& tile, const Coefficients<Compute>& c) {
    RandomBitsOfTile random;
    UncodedMomentum uncoded;
    if constexpr (Types::kMomentumRounds)
      random.momentum_buffer.draw(tile.rng, RoundedTensor::momentum_buffer);
    if constexpr (Types::kWeightMayRound) {
      if (tile.rounds_weight) {
        random.weight.draw(tile.rng, RoundedTensor::weight);
        if constexpr (Types::kMomentumRoundsAsWeight) {
          random.momentum_buffer.draw(tile.rng, RoundedTensor::momentum_buffer);
        }
        update_elements<true>(tile, c, random, uncoded);
      } else {
        update_elements<false>(tile, c, random, uncoded);
      }
    } else {
      update_elements<false>(tile, c, random, uncoded);
    }
    if constexpr (Types::kHasCodes) encode_momentum(tile, random, uncoded);
  }

 private:
  struct RandomBitsOfTile {
    RandomVectors<kVector> weight, momentum_buffer;
  };

  // A block's scale is known once all of its elements are. Until then they stay as they are computed.
  struct UncodedMomentum {
    float elements[kVectorsPerThread][kVector];
    uint32_t largest[kVectorsPerThread];  // of the magnitudes of a vector, as bits
  };

  static __device__ __forceinline__ PackedWeight* weights_of(unsigned char* stage) {
    return reinterpret_cast<PackedWeight*>(stage);
  }
  static __device__ __forceinline__ PackedGrad* grads_of(unsigned char* stage) {
    return reinterpret_cast<PackedGrad*>(stage + sizeof(typename Types::Weight) * Types::kTile);
  }

  // By one access.
  template <typename P>
  static __device__ __forceinline__ void copy(P& to, const P& from) {
    *reinterpret_cast<Access<P>*>(to.words) = *reinterpret_cast<const Access<P>*>(from.words);
  }

  template <bool kLast>
  static __device__ __forceinline__ void load_weight(PackedWeight& to, const Tile<Types>& tile,
                                                     uint32_t first, int inside, uint32_t misaligned) {
    fused_lars::load<kLast>(to, tile.weight + first, !(misaligned & tile.kWeight), inside);
    if constexpr (Types::kHasMaster) {
      if (tile.master_follows) take_over(to, tile, first, inside, misaligned);
    }
  }

  // See take_over in csrc/step.h.
  static __device__ __forceinline__ void take_over(PackedWeight& master, const Tile<Types>& tile,
                                                   uint32_t first, int inside, uint32_t misaligned) {
    using Param = typename Types::Param;
    Packed<Param, kVector> param;
    fused_lars::load<false>(param, tile.param + first, !(misaligned & tile.kParam), inside);
#pragma unroll
    for (int e = 0; e < kVector; ++e) {
      const Param written = param.get(e), rounded = static_cast<Param>(master.get(e));
      if (bits_of(written) != bits_of(rounded)) master.set(e, static_cast<float>(written));
    }
  }

  __device__ __forceinline__ void load_momentum(const Tile<Types>& tile, int k, uint32_t first, int inside,
                                                uint32_t misaligned) {
    momentum_buffer_[k] = {};
    if constexpr (Types::kHasCodes) {
      // Through L1: a sector has the scales of several blocks.
      scale_[k] = inside > 0 ? __ldca(tile.momentum_scale + first / kScaleBlock) : 0.0f;
    }
    if (tile.momentum_buffer == nullptr) return;
    fused_lars::load<true>(momentum_buffer_[k], tile.momentum_buffer + first,
                           !(misaligned & tile.kMomentumBuffer), inside);
  }

  // Of this thread's elements: the weights and what norm_element makes of a gradient and its weight.
  template <typename NormElement>
  __device__ __forceinline__ Sums<Compute> squares_of_thread(const NormElement& norm_element) const {
    Sums<Compute> sums = {};
#pragma unroll
    for (int k = 0; k < kVectorsPerThread; ++k) {
#pragma unroll
      for (int e = 0; e < kVector; ++e) {
        const auto weight = static_cast<Compute>(weight_[k].get(e));
        const Compute grad = norm_element(static_cast<Compute>(grad_[k].get(e)), weight);
        sums.weight = fma(weight, weight, sums.weight);
        sums.grad = fma(grad, grad, sums.grad);
      }
    }
    return sums;
  }

  // Calls f(k, first element, how many exist from there, misaligned) for each of this thread's vectors. Of a
  // whole and aligned tile the compiler knows the last two.
  template <typename F>
  static __device__ __forceinline__ void for_each_vector(const Tile<Types>& tile, const F& f) {
    const uint32_t first = threadIdx.x * kVector;
    if (tile.count == Types::kTile && tile.misaligned == 0) {
#pragma unroll
      for (int k = 0; k < kVectorsPerThread; ++k) f(k, first + k * kWorkers * kVector, kVector, 0);
    } else {
#pragma unroll
      for (int k = 0; k < kVectorsPerThread; ++k) {
        const uint32_t begin = first + k * kWorkers * kVector;
        f(k, begin, static_cast<int>(tile.count) - static_cast<int>(begin), tile.misaligned);
      }
    }
  }

  __device__ __forceinline__ Compute momentum_of(int k, int e) const {
    if constexpr (Types::kHasCodes) {
      return decode(momentum_buffer_[k].get(e), scale_[k]);
    } else {
      return static_cast<Compute>(momentum_buffer_[k].get(e));
    }
  }

  template <bool kRoundsWeight>
  __device__ __forceinline__ void update_elements(const Tile<Types>& tile, Coefficients<Compute> c,
                                                  const RandomBitsOfTile& random, UncodedMomentum& uncoded) {
    if constexpr (kRoundsWeight || Types::kMomentumRounds) {
      // One copy of the code. Rounding costs more than the branch, and such kernels take long to compile.
      update_vectors<kRoundsWeight>(tile, c, random, uncoded);
    } else if (c.nesterov) {
      c.nesterov = true;  // known to the compiler from here
      update_vectors<kRoundsWeight>(tile, c, random, uncoded);
    } else {
      c.nesterov = false;
      update_vectors<kRoundsWeight>(tile, c, random, uncoded);
    }
  }

  // Stores all but int8 momentum, which goes to `uncoded`.
  template <bool kRoundsWeight>
  __device__ __forceinline__ void update_vectors(const Tile<Types>& tile, const Coefficients<Compute>& c,
                                                 const RandomBitsOfTile& random, UncodedMomentum& uncoded) {
    for_each_vector(tile, [&](int k, uint32_t first, int inside, uint32_t misaligned) {
      Packed<typename Types::Param, kVector> param;
      if constexpr (Types::kHasCodes) uncoded.largest[k] = 0;
#pragma unroll
      for (int e = 0; e < kVector; ++e) {
        auto weight = static_cast<Compute>(weight_[k].get(e));
        Compute momentum_buffer = momentum_of(k, e);
        fused_lars::update(c, static_cast<Compute>(grad_[k].get(e)), weight, momentum_buffer);
        if constexpr (Types::kHasCodes) {
          uncoded.elements[k][e] = momentum_buffer;
          // What lies outside of the tensor may have become NaN.
          if (e < inside) uncoded.largest[k] = max(uncoded.largest[k], magnitude_bits(momentum_buffer));
        } else {
          constexpr bool kRounds =
              Types::kMomentumRounds || (kRoundsWeight && Types::kMomentumRoundsAsWeight);
          set<kRounds>(momentum_buffer_[k], e, momentum_buffer, random.momentum_buffer, k);
        }
        set<kRoundsWeight>(weight_[k], e, weight, random.weight, k);
        if constexpr (Types::kHasMaster) param.set(e, static_cast<typename Types::Param>(weight));
      }
      store(weight_[k], tile.weight + first, !(misaligned & tile.kWeight), inside);
      if constexpr (!Types::kHasCodes) store_momentum(tile, k, first, inside, misaligned);
      if constexpr (Types::kHasMaster) {
        store(param, tile.param + first, !(misaligned & tile.kParam), inside);
      }
    });
  }

  // Sets an element of the k-th vector, rounded.
  template <bool kStochastically, typename T>
  static __device__ __forceinline__ void set(Packed<T, kVector>& to, int e, Compute value,
                                             const RandomVectors<kVector>& random, int k) {
    if constexpr (kStochastically) {
      to.set_bits(e, rounded_bits<T>(value, random.of(k, e)));
    } else {
      to.set(e, static_cast<T>(value));
    }
  }

  __device__ __forceinline__ void store_momentum(const Tile<Types>& tile, int k, uint32_t first, int inside,
                                                 uint32_t misaligned) const {
    if (tile.momentum_buffer == nullptr) return;
    store(momentum_buffer_[k], tile.momentum_buffer + first, !(misaligned & tile.kMomentumBuffer), inside);
  }

  // Encodes momentum as int8 and stores it.
  __device__ __forceinline__ void encode_momentum(const Tile<Types>& tile, const RandomBitsOfTile& random,
                                                  const UncodedMomentum& uncoded) {
    using Lanes = LanesOfBlock<kVector>;
    const BlockScale own = block_scale(Lanes::max_of_own(uncoded.largest));
    const uint32_t own_block = Lanes::own_block();
    if (threadIdx.x % Lanes::kQuarter == 0 && own_block * kScaleBlock < tile.count) {
      tile.momentum_scale[own_block] = own.scale;
    }
    float gain[kVectorsPerThread];
#pragma unroll
    for (int k = 0; k < kVectorsPerThread; ++k) gain[k] = Lanes::of_block(k, own.gain);
    for_each_vector(tile, [&](int k, uint32_t first, int inside, uint32_t misaligned) {
#pragma unroll
      for (int e = 0; e < kVector; ++e) {
        momentum_buffer_[k].set(e, encode(uncoded.elements[k][e], gain[k], random.momentum_buffer.of(k, e)));
      }
      store_momentum(tile, k, first, inside, misaligned);
    });
  }

  PackedWeight weight_[kVectorsPerThread];
  PackedGrad grad_[kVectorsPerThread];
  Packed<typename Types::MomentumBuffer, kVector> momentum_buffer_[kVectorsPerThread];
  float scale_[kVectorsPerThread];  // of the blocks of int8 momentum
};

}  // namespace fused_lars
