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

namespace fused_lars {

constexpr int kWorkers = 224;  // threads; with the dispatcher's warp a block has 256
constexpr int kWorkerWarps = kWorkers / 32;
constexpr int kVectorsPerThread = 4;
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

  // Elements of a vector: the widest type is accessed by 16 bytes.
  static constexpr size_t kVector =
      kVectorBytes / std::max({sizeof(Weight), sizeof(Grad), sizeof(MomentumBuffer)});
  static constexpr uint32_t kTile = kWorkers * kVectorsPerThread * kVector;
  static constexpr uint32_t kStageBytes = kTile * (sizeof(Weight) + sizeof(Grad));
};

// Of an element of 16 bits.
template <typename T>
__device__ __forceinline__ uint16_t bits_of(T element) {
  uint16_t bits;
  memcpy(&bits, &element, sizeof element);
  return bits;
}

// Elements as one access reads and writes them. Those of 16 bits stay packed until they are used: a tile of
// them unpacked would not fit in registers.
template <typename T, int kVector>
struct Packed {
  using Word = std::conditional_t<sizeof(T) == 2, uint32_t, T>;
  static constexpr int kWords = kVector * sizeof(T) / sizeof(Word);
  alignas(kVector * sizeof(T)) Word words[kWords];

  __device__ __forceinline__ T get(int e) const {
    if constexpr (sizeof(T) == 2) {
      const auto bits = static_cast<uint16_t>(words[e / 2] >> (e % 2 * 16));
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
    if constexpr (sizeof(T) == 2) {
      const uint16_t bits = bits_of(element);
      const uint32_t other = words[e / 2] & (e % 2 == 0 ? 0xffff0000u : 0x0000ffffu);
      words[e / 2] = other | static_cast<uint32_t>(bits) << (e % 2 * 16);
    } else {
      words[e] = element;
    }
  }
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

// One tile of one tensor.
template <typename Types>
struct Tile {
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

  // Applies the rule to the loaded tile and stores it.
  __device__ __forceinline__ void update(const Tile<Types>& tile, Coefficients<Compute> c) {
    if (c.nesterov) {
      c.nesterov = true;  // known to the compiler from here
      update_elements(tile, c);
    } else {
      c.nesterov = false;
      update_elements(tile, c);
    }
  }

 private:
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

  __device__ __forceinline__ void update_elements(const Tile<Types>& tile, const Coefficients<Compute>& c) {
    for_each_vector(tile, [&](int k, uint32_t first, int inside, uint32_t misaligned) {
      Packed<typename Types::Param, kVector> param;
#pragma unroll
      for (int e = 0; e < kVector; ++e) {
        auto weight = static_cast<Compute>(weight_[k].get(e));
        auto momentum_buffer = static_cast<Compute>(momentum_buffer_[k].get(e));
        fused_lars::update(c, static_cast<Compute>(grad_[k].get(e)), weight, momentum_buffer);
        weight_[k].set(e, static_cast<typename Types::Weight>(weight));
        momentum_buffer_[k].set(e, static_cast<typename Types::MomentumBuffer>(momentum_buffer));
        if constexpr (Types::kHasMaster) param.set(e, static_cast<typename Types::Param>(weight));
      }
      store(weight_[k], tile.weight + first, !(misaligned & tile.kWeight), inside);
      if (tile.momentum_buffer != nullptr) {
        store(momentum_buffer_[k], tile.momentum_buffer + first, !(misaligned & tile.kMomentumBuffer),
              inside);
      }
      if constexpr (Types::kHasMaster) {
        store(param, tile.param + first, !(misaligned & tile.kParam), inside);
      }
    });
  }

  PackedWeight weight_[kVectorsPerThread];
  PackedGrad grad_[kVectorsPerThread];
  Packed<typename Types::MomentumBuffer, kVector> momentum_buffer_[kVectorsPerThread];
};

}  // namespace fused_lars
