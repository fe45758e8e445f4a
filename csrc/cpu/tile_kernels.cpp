// Compiled once for each instruction set; FUSED_LARS_ISA names the variant. Everything here has internal
// linkage, except the table at the end. tile_kernels.h names the hazard.

#include "tile_kernels.h"

#include <algorithm>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace fused_lars {
namespace {

#if defined(__AVX512F__)
constexpr int64_t kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int64_t kVectorBytes = 32;
#else
constexpr int64_t kVectorBytes = 16;
#endif

template <typename T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
  static constexpr int64_t size = kVectorBytes / sizeof(T);
};
template <typename T>
using Vector = typename VectorOf<T>::type;

// memcpy, because memory may be aligned to elements only, not to vectors.
template <typename T>
FUSED_LARS_INLINE Vector<T> load(const T* from) {
  Vector<T> x;
  std::memcpy(&x, from, sizeof(x));
  return x;
}
template <typename T>
FUSED_LARS_INLINE void store(T* to, Vector<T> x) {
  std::memcpy(to, &x, sizeof(x));
}

// ---------------------------------------------------------------- conversion to the type of computation

FUSED_LARS_INLINE float from_bf16(uint16_t x) { return bits_to_float(static_cast<uint32_t>(x) << 16); }
// Rounds to nearest, ties to even. NaN stays NaN.
FUSED_LARS_INLINE uint16_t to_bf16(float x) {
  const uint32_t bits = float_to_bits(x);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

#if defined(__F16C__)
FUSED_LARS_INLINE float from_f16(uint16_t x) { return _cvtsh_ss(x); }
FUSED_LARS_INLINE uint16_t to_f16(float x) { return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }
#else
// Exact. A multiplication corrects the exponent, which also works for subnormal numbers.
FUSED_LARS_INLINE float from_f16(uint16_t x) {
  const uint32_t magnitude = static_cast<uint32_t>(x & 0x7fff) << 13;
  const uint32_t sign = static_cast<uint32_t>(x & 0x8000) << 16;
  const bool special = magnitude >= 0x0f800000;  // inf and NaN
  const float rebased = bits_to_float(magnitude) * 0x1p112f;
  return bits_to_float((special ? magnitude | 0x7f800000 : float_to_bits(rebased)) | sign);
}
// Rounds to nearest, ties to even. For subnormal results an addition does the rounding: it adds a power of
// two whose last place is that of the result, and the power is then taken off.
FUSED_LARS_INLINE uint16_t to_f16(float x) {
  const uint32_t bits = float_to_bits(x);
  const uint32_t sign = (bits >> 16) & 0x8000;
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
  if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // rounds to 65536 or more
  if (magnitude < 0x38800000) {                                              // subnormal: last place 2^-24
    const float shifted = bits_to_float(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (float_to_bits(shifted) - float_to_bits(0.5f)));
  }
  const uint32_t rounded = magnitude + 0x0fff + ((magnitude >> 13) & 1);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000) >> 13));
}
#endif

constexpr int64_t kChunk = 512;  // elements converted at a time; three such buffers stay in L1

template <typename To, typename From, typename Convert>
FUSED_LARS_INLINE void convert(const From* from, To* to, int64_t count, Convert one) {
  for (int64_t i = 0; i < count; ++i) to[i] = one(from[i]);
}

#if defined(__F16C__)
constexpr int64_t kHalfVector = 8;
FUSED_LARS_INLINE void widen_f16(const uint16_t* from, float* to, int64_t count) {
  int64_t i = 0;
  for (; i + kHalfVector <= count; i += kHalfVector) {
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
  }
  convert(from + i, to + i, count - i, from_f16);
}
FUSED_LARS_INLINE void narrow_f16(const float* from, uint16_t* to, int64_t count) {
  int64_t i = 0;
  for (; i + kHalfVector <= count; i += kHalfVector) {
    const __m128i halves = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), halves);
  }
  convert(from + i, to + i, count - i, to_f16);
}
#else
FUSED_LARS_INLINE void widen_f16(const uint16_t* from, float* to, int64_t count) {
  convert(from, to, count, from_f16);
}
FUSED_LARS_INLINE void narrow_f16(const float* from, uint16_t* to, int64_t count) {
  convert(from, to, count, to_f16);
}
#endif

template <typename T>
constexpr Element element_of = sizeof(T) == sizeof(float) ? Element::f32 : Element::f64;

// Returns `count` elements from `offset` as T. If the memory holds T this is the memory itself; otherwise the
// elements are converted into `scratch`.
template <typename T>
FUSED_LARS_INLINE T* open(ElementPointer x, int64_t offset, int64_t count, T* scratch) {
  if (x.element == element_of<T>) return static_cast<T*>(x.data) + offset;
  if constexpr (sizeof(T) == sizeof(double)) {  // fp32 companions of fp64 parameters
    const auto widen = [](float e) { return static_cast<double>(e); };
    convert(static_cast<float*>(x.data) + offset, scratch, count, widen);
  } else if (x.element == Element::bf16) {
    convert(static_cast<uint16_t*>(x.data) + offset, scratch, count, from_bf16);
  } else {
    widen_f16(static_cast<uint16_t*>(x.data) + offset, scratch, count);
  }
  return scratch;
}

// Writes `values` to `count` elements from `offset`. There is nothing to write if open() returned the memory
// itself.
template <typename T>
FUSED_LARS_INLINE void close(ElementPointer x, int64_t offset, int64_t count, const T* values) {
  if (x.element == element_of<T>) return;
  if constexpr (sizeof(T) == sizeof(double)) {
    convert(values, static_cast<float*>(x.data) + offset, count,
            [](double e) { return static_cast<float>(e); });
  } else if (x.element == Element::bf16) {
    convert(values, static_cast<uint16_t*>(x.data) + offset, count, to_bf16);
  } else {
    narrow_f16(values, static_cast<uint16_t*>(x.data) + offset, count);
  }
}

// ---------------------------------------------------------------- stochastic rounding

// The product of the low words of each lane.
FUSED_LARS_INLINE Vector<uint64_t> multiply_words(Vector<uint64_t> x, uint32_t factor) {
#if defined(__AVX512F__)
  // With a mask of all lanes: GCC 12 warns of the form without.
  return reinterpret_cast<Vector<uint64_t>>(
      _mm512_maskz_mul_epu32(0xff, reinterpret_cast<__m512i>(x), _mm512_set1_epi64(factor)));
#elif defined(__AVX2__)
  return reinterpret_cast<Vector<uint64_t>>(
      _mm256_mul_epu32(reinterpret_cast<__m256i>(x), _mm256_set1_epi64x(factor)));
#elif defined(__SSE2__)
  return reinterpret_cast<Vector<uint64_t>>(
      _mm_mul_epu32(reinterpret_cast<__m128i>(x), _mm_set1_epi64x(factor)));
#else
  return (x & 0xffffffff) * factor;
#endif
}

// 16 random bits for each element of a chunk: draw_bits of rounding.h, for several vectors of draws at a
// time.
class ChunkRandomBits {
 public:
  ChunkRandomBits(const RngState& rng, RoundedTensor tensor, int64_t offset, int64_t count) {
    const auto first = static_cast<uint64_t>(rng.first_element + offset);
    skipped_ = static_cast<int64_t>(first % kElementsPerDraw);
    const int64_t draws = (skipped_ + count + kElementsPerDraw - 1) / kElementsPerDraw;
    uint64_t halves[2][kMostDraws];
    for (int64_t i = 0; i < draws; i += kAtOnce) {
      draw_at_once(rng, tensor, first / kElementsPerDraw + i, halves[0] + i, halves[1] + i);
    }
    typedef uint64_t __attribute__((may_alias)) * FourOfThem;
    auto* to = reinterpret_cast<FourOfThem>(bits_);
    for (int64_t i = 0; i < draws; ++i) {
      to[4 * i] = halves[0][i], to[4 * i + 1] = halves[1][i];
      to[4 * i + 2] = ~halves[0][i], to[4 * i + 3] = ~halves[1][i];
    }
  }
  FUSED_LARS_INLINE const uint16_t* data() const { return bits_ + skipped_; }

 private:
  static constexpr int64_t kLanes = VectorOf<uint64_t>::size;
  static constexpr int64_t kVectors = 2;  // one alone would wait for the latency of each multiplication
  static constexpr int64_t kAtOnce = kLanes * kVectors;
  // One more draw than a chunk has if it begins within a draw, filled up to whole vectors.
  static constexpr int64_t kMostDraws = kChunk / kElementsPerDraw + kAtOnce;

  // Writes the first and the second half of each draw. A lane has a draw of its own, and each of its words is
  // the low half of a lane; nothing reads the high half.
  FUSED_LARS_INLINE static void draw_at_once(const RngState& rng, RoundedTensor tensor, uint64_t draw,
                                             uint64_t* first_half, uint64_t* second_half) {
    Vector<uint64_t> a[kVectors], b[kVectors], c[kVectors], d[kVectors], zero = {};
    const RandomBits counter = draw_counter(rng, tensor, draw);
    for (int64_t v = 0; v < kVectors; ++v) {
      for (int64_t lane = 0; lane < kLanes; ++lane) a[v][lane] = static_cast<uint64_t>(v * kLanes + lane);
      a[v] += draw;
      b[v] = a[v] >> 32;
      c[v] = zero + counter.words[2];
      d[v] = zero + counter.words[3];
    }
    auto key0 = static_cast<uint32_t>(rng.key), key1 = static_cast<uint32_t>(rng.key >> 32);
    for (int round = 0; round < kPhiloxRounds; ++round) {
      for (int64_t v = 0; v < kVectors; ++v) {
        const auto product0 = multiply_words(a[v], kPhiloxMultiplier[0]);
        const auto product1 = multiply_words(c[v], kPhiloxMultiplier[1]);
        a[v] = product1 >> 32 ^ b[v] ^ key0;
        c[v] = product0 >> 32 ^ d[v] ^ key1;
        b[v] = product1;
        d[v] = product0;
      }
      key0 += kPhiloxIncrement[0];
      key1 += kPhiloxIncrement[1];
    }
    for (int64_t v = 0; v < kVectors; ++v) {
      store(first_half + v * kLanes, (a[v] & 0xffffffff) | b[v] << 32);
      store(second_half + v * kLanes, (c[v] & 0xffffffff) | d[v] << 32);
    }
  }

  int64_t skipped_;
  alignas(uint64_t) uint16_t bits_[kElementsPerDraw * kMostDraws];
};

// Writes fp32 values to `count` elements of fp16 or bf16, from `offset`.
void close_stochastically(ElementPointer x, int64_t offset, int64_t count, const float* values,
                          const uint16_t* bits) {
  auto* __restrict to = static_cast<uint16_t*>(x.data) + offset;
  if (x.element == Element::bf16) {
    for (int64_t i = 0; i < count; ++i) to[i] = round_to_bf16(values[i], bits[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = round_to_f16(values[i], bits[i]);
  }
}

// Calls f(first, count) for each block of a chunk.
template <typename F>
FUSED_LARS_INLINE void for_blocks(int64_t count, const F& f) {
  static_assert(kChunk % kScaleBlock == 0);
  for (int64_t i = 0; i < count; i += kScaleBlock) f(i, std::min<int64_t>(kScaleBlock, count - i));
}

void open_int8(const TensorPointers& tensors, int64_t offset, int64_t count, float* values) {
  const auto* codes = static_cast<const int8_t*>(tensors.momentum_buffer.data) + offset;
  for_blocks(count, [&](int64_t first, int64_t n) {
    const float scale = tensors.momentum_scale[(offset + first) / kScaleBlock];
    for (int64_t i = first; i < first + n; ++i) values[i] = decode(codes[i], scale);
  });
}

// Not inlined, because GCC 12 would then warn that random bits may not have been set.
[[gnu::noinline]] void close_int8(const TensorPointers& tensors, int64_t offset, int64_t count,
                                  const float* values, const uint16_t* bits) {
  auto* __restrict codes = static_cast<int8_t*>(tensors.momentum_buffer.data) + offset;
  for_blocks(count, [&](int64_t first, int64_t n) {
    int32_t largest = 0;
    for (int64_t i = first; i < first + n; ++i) {
      largest = std::max(largest, static_cast<int32_t>(float_to_bits(values[i]) & 0x7fffffff));
    }
    const BlockScale block = block_scale(static_cast<uint32_t>(largest));
    for (int64_t i = first; i < first + n; ++i) codes[i] = encode(values[i], block.gain, bits[i]);
    tensors.momentum_scale[(offset + first) / kScaleBlock] = block.scale;
  });
}

// ---------------------------------------------------------------- squared norm

// Sums squares in a fixed number of lanes. Element i is always added to lane i % kLanes, whatever the width
// of a vector. The lanes fill several vectors, because a single one would wait for the latency of each
// addition.
template <typename T>
class SquareSum {
 public:
  static constexpr int64_t kLanes = 128 / sizeof(T);

  // element(i) returns a vector of the elements from i on.
  template <typename Elements>
  FUSED_LARS_INLINE void add_lanes_of(const Elements& element) {
    for (int64_t k = 0; k < kVectors; ++k) {
      const Vector<T> e = element(k * VectorOf<T>::size);
      sums_[k] += e * e;
    }
  }
  FUSED_LARS_INLINE void add_lanes(const T* x) {
    add_lanes_of([x](int64_t i) { return load(x + i); });
  }

  FUSED_LARS_INLINE double total() const {
    T lanes[kLanes];
    std::memcpy(lanes, sums_, sizeof(lanes));
    double total = 0.0;
    for (const T lane : lanes) total += lane;
    return total;
  }

 private:
  static constexpr int64_t kVectors = kLanes / VectorOf<T>::size;

  Vector<T> sums_[kVectors] = {};
};

// A copy of the last elements, which are fewer than kLanes, filled up with zeros.
template <typename T>
class Rest {
 public:
  Rest(const T* x, int64_t count) { std::memcpy(padded_, x, count * sizeof(T)); }
  FUSED_LARS_INLINE const T* data() const { return padded_; }

 private:
  T padded_[SquareSum<T>::kLanes] = {};
};

// One loop reads both tensors. A core that only reads waits for the latency of memory. Two streams, each with
// prefetches ahead, wait less than one.
template <typename T, bool is_decayed>
FUSED_LARS_INLINE SquaredNorms squared_norms(ElementPointer weight, ElementPointer grad,
                                             const DecayedGradient<T>& decayed, int64_t offset,
                                             int64_t count) {
  constexpr int64_t kLanes = SquareSum<T>::kLanes;
  constexpr int64_t kAhead = 1024 / sizeof(T);
  T weight_scratch[kChunk], grad_scratch[kChunk];
  SquareSum<T> weight_sum, grad_sum;
  const auto add_lanes = [&](const T* w, const T* g) {
    weight_sum.add_lanes(w);
    if constexpr (is_decayed) {
      grad_sum.add_lanes_of([&](int64_t i) { return decayed(load(g + i), load(w + i)); });
    } else {
      grad_sum.add_lanes(g);
    }
  };
  const bool converts = weight.element != element_of<T> || grad.element != element_of<T>;
  const int64_t chunk = converts ? kChunk : count;
  for (int64_t i = 0; i < count; i += chunk) {
    const int64_t n = std::min(chunk, count - i);
    const T* w = open(weight, offset + i, n, weight_scratch);
    const T* g = open(grad, offset + i, n, grad_scratch);
    int64_t k = 0;
    for (; k + kLanes <= n; k += kLanes) {
      for (int64_t line = 0; line < kLanes; line += 64 / sizeof(T)) {
        __builtin_prefetch(w + k + kAhead + line);
        __builtin_prefetch(g + k + kAhead + line);
      }
      add_lanes(w + k, g + k);
    }
    if (k < n) add_lanes(Rest<T>(w + k, n - k).data(), Rest<T>(g + k, n - k).data());
  }
  return {weight_sum.total(), grad_sum.total()};
}

// The factors as T, the type that elements are computed in, multiplied by a power of two.
template <typename T>
FUSED_LARS_INLINE DecayedGradient<T> scaled(const DecayedGradient<double>& decayed, double scale = 1.0) {
  return {static_cast<T>(decayed.grad_gain * scale), static_cast<T>(decayed.weight_decay * scale)};
}

template <typename T>
SquaredNorms squared_norms(ElementPointer weight, ElementPointer grad, DecayedNorm decayed, int64_t offset,
                           int64_t count) {
  if (decayed) return squared_norms<T, true>(weight, grad, scaled<T>(*decayed), offset, count);
  return squared_norms<T, false>(weight, grad, {}, offset, count);
}

// The sum of squares of `count` elements. x(i, n, to) writes n of them, from i on, to `to`. It is seldom
// needed, so it is simple rather than fast.
template <typename T, typename Elements>
FUSED_LARS_INLINE double scaled_squared_norm(int64_t count, const Elements& x) {
  constexpr int64_t kLanes = SquareSum<T>::kLanes;
  static_assert(kChunk % kLanes == 0);
  T elements[kChunk];
  SquareSum<T> sum;
  for (int64_t i = 0; i < count; i += kChunk) {
    const int64_t n = std::min(kChunk, count - i);
    x(i, n, elements);
    std::fill(elements + n, elements + kChunk, T(0));
    for (int64_t k = 0; k < n; k += kLanes) sum.add_lanes(elements + k);
  }
  return sum.total();
}

template <typename T>
SquaredNorms scaled_squared_norms(ElementPointer weight, ElementPointer grad, DecayedNorm decayed,
                                  int64_t offset, int64_t count, double weight_scale, double grad_scale) {
  T weight_scratch[kChunk], grad_scratch[kChunk];
  const auto scaled_norm = [&](ElementPointer x, double scale, T* scratch) {
    const T factor = static_cast<T>(scale);
    return scaled_squared_norm<T>(count, [&](int64_t i, int64_t n, T* to) {
      convert(open(x, offset + i, n, scratch), to, n, [factor](T e) { return e * factor; });
    });
  };
  const double weight_sum = scaled_norm(weight, weight_scale, weight_scratch);
  if (!decayed) return {weight_sum, scaled_norm(grad, grad_scale, grad_scratch)};
  const auto factors = scaled<T>(*decayed, grad_scale);
  const double grad_sum = scaled_squared_norm<T>(count, [&](int64_t i, int64_t n, T* to) {
    const T* w = open(weight, offset + i, n, weight_scratch);
    const T* g = open(grad, offset + i, n, grad_scratch);
    for (int64_t k = 0; k < n; ++k) to[k] = factors(g[k], w[k]);
  });
  return {weight_sum, grad_sum};
}

// ---------------------------------------------------------------- update

template <typename T, bool nesterov, bool has_momentum>
FUSED_LARS_INLINE void update_run(Coefficients<T> c, T* weight, const T* grad, T* momentum_buffer,
                                  int64_t count) {
  c.nesterov = nesterov;
  int64_t i = 0;
  for (; i + VectorOf<T>::size <= count; i += VectorOf<T>::size) {
    Vector<T> w = load(weight + i);
    Vector<T> v = {};
    if constexpr (has_momentum) v = load(momentum_buffer + i);
    update(c, load(grad + i), w, v);
    if constexpr (has_momentum) store(momentum_buffer + i, v);
    store(weight + i, w);
  }
  for (; i < count; ++i) {
    T v = has_momentum ? momentum_buffer[i] : T(0);
    update(c, grad[i], weight[i], v);
    if constexpr (has_momentum) momentum_buffer[i] = v;
  }
}

template <typename T>
FUSED_LARS_INLINE T* open_momentum(const TensorPointers& tensors, int64_t offset, int64_t count, T* scratch) {
  if constexpr (sizeof(T) == sizeof(float)) {
    if (tensors.momentum_scale != nullptr) {
      open_int8(tensors, offset, count, scratch);
      return scratch;
    }
  }
  return open(tensors.momentum_buffer, offset, count, scratch);
}

// Writes the updated weight or momentum, rounded as the step asks for.
template <typename T>
FUSED_LARS_INLINE void close_rounded(const TensorPointers& tensors, RoundedTensor which, int64_t offset,
                                     int64_t count, const T* values) {
  const bool is_weight = which == RoundedTensor::weight;
  const ElementPointer x = is_weight ? tensors.weight : tensors.momentum_buffer;
  if constexpr (sizeof(T) == sizeof(float)) {
    if (is_weight ? tensors.rounds_weight_stochastically : tensors.rounds_momentum_stochastically) {
      const ChunkRandomBits random(tensors.rng, which, offset, count);
      if (x.element == Element::i8) {
        close_int8(tensors, offset, count, values, random.data());
      } else {
        close_stochastically(x, offset, count, values, random.data());
      }
      return;
    }
  }
  close(x, offset, count, values);
}

// update_run with momentum in bf16, converted on the way and rounded stochastically. For the other types,
// which are converted in runs of their own, that would save less.
template <bool nesterov>
void update_bf16_run(Coefficients<float> c, float* __restrict weight, const float* __restrict grad,
                     uint16_t* __restrict momentum_buffer, const uint16_t* bits, int64_t count) {
  c.nesterov = nesterov;
  for (int64_t i = 0; i < count; ++i) {
    float w = weight[i], v = from_bf16(momentum_buffer[i]);
    update(c, grad[i], w, v);
    weight[i] = w;
    momentum_buffer[i] = round_to_bf16(v, bits[i]);
  }
}

// Returns whether the tensors are of the types for it.
FUSED_LARS_INLINE bool update_chunk_of_bf16(const Coefficients<float>& c, const TensorPointers& tensors,
                                            int64_t offset, int64_t count) {
  if (tensors.weight.element != Element::f32 || tensors.grad.element != Element::f32 ||
      tensors.momentum_buffer.element != Element::bf16 || tensors.low_precision.data != nullptr) {
    return false;
  }
  const ChunkRandomBits random(tensors.rng, RoundedTensor::momentum_buffer, offset, count);
  const auto run = c.nesterov ? update_bf16_run<true> : update_bf16_run<false>;
  run(c, static_cast<float*>(tensors.weight.data) + offset,
      static_cast<const float*>(tensors.grad.data) + offset,
      static_cast<uint16_t*>(tensors.momentum_buffer.data) + offset, random.data(), count);
  return true;
}

template <typename T>
void update_tile(const Coefficients<T>& c, const TensorPointers& tensors, int64_t offset, int64_t count) {
  T weight_scratch[kChunk], grad_scratch[kChunk], buffer_scratch[kChunk];
  const bool has_momentum = tensors.momentum_buffer.data != nullptr;
  const bool has_low_precision = tensors.low_precision.data != nullptr;
  const bool converts = tensors.weight.element != element_of<T> || tensors.grad.element != element_of<T> ||
                        (has_momentum && tensors.momentum_buffer.element != element_of<T>);
  const int64_t chunk = converts ? kChunk : count;
  for (int64_t i = 0; i < count; i += chunk) {
    const int64_t n = std::min(chunk, count - i);
    const int64_t at = offset + i;
    if constexpr (sizeof(T) == sizeof(float)) {
      if (has_momentum && update_chunk_of_bf16(c, tensors, at, n)) continue;
    }
    T* weight = open(tensors.weight, at, n, weight_scratch);
    const T* grad = open(tensors.grad, at, n, grad_scratch);
    if (has_momentum) {
      T* buffer = open_momentum(tensors, at, n, buffer_scratch);
      if (c.nesterov) {
        update_run<T, true, true>(c, weight, grad, buffer, n);
      } else {
        update_run<T, false, true>(c, weight, grad, buffer, n);
      }
      close_rounded(tensors, RoundedTensor::momentum_buffer, at, n, buffer);
    } else {
      update_run<T, false, false>(c, weight, grad, nullptr, n);
    }
    close_rounded(tensors, RoundedTensor::weight, at, n, weight);
    if (has_low_precision) close(tensors.low_precision, at, n, weight);
  }
}

}  // namespace

#define FUSED_LARS_TABLE_NAME(isa) FUSED_LARS_TABLE_NAME_(isa)
#define FUSED_LARS_TABLE_NAME_(isa) tile_kernels_##isa
#define FUSED_LARS_STRING(isa) FUSED_LARS_STRING_(isa)
#define FUSED_LARS_STRING_(isa) #isa

extern const TileKernels FUSED_LARS_TABLE_NAME(FUSED_LARS_ISA);
const TileKernels FUSED_LARS_TABLE_NAME(FUSED_LARS_ISA) = {squared_norms<float>,
                                                           squared_norms<double>,
                                                           scaled_squared_norms<float>,
                                                           scaled_squared_norms<double>,
                                                           update_tile<float>,
                                                           update_tile<double>,
                                                           FUSED_LARS_STRING(FUSED_LARS_ISA)};

}  // namespace fused_lars
