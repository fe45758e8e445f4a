#pragma once

// How the step keeps numbers in fewer bits than it computes in: stochastic rounding to 16 bits, and momentum
// in 8 bits. The CPU step and the CUDA kernel call these functions, so both keep the same bits.
//
// Rounding to nearest loses every change that is smaller than half a unit in the last place. A bf16 momentum
// buffer that should decay by 0.1 % a step stays as it is. Stochastic rounding rounds up with the
// probability of the fraction that it cuts off, so the mean over many steps is right (Gupta, Agrawal,
// Gopalakrishnan, Narayanan 2015, "Deep Learning with Limited Numerical Precision", section 3).
//
// The random bits of an element depend on the parameter's key, the number of its updates and the element's
// index alone. So they do not depend on threads, blocks or vector widths, and a resumed run draws the same.

#include <cstdint>
#include <cstring>
#include <limits>

#include "rule.h"

namespace fused_lars {

// A parameter's rng_state, as the tensor of that name holds it.
struct RngState {
  int64_t key;
  int64_t update;         // the number of updates applied so far
  int64_t first_element;  // the index of the tensor's first element: not 0 in a shard of a larger tensor
};
// The key of the parameter at some position in an optimizer.
inline int64_t rng_key(int64_t seed, int64_t position) { return seed << 32 | position; }
constexpr int64_t kRngStateSize = sizeof(RngState) / sizeof(int64_t);

// Two tensors of a parameter may be rounded in one update. Each has random bits of its own.
enum class RoundedTensor : uint32_t { momentum_buffer, weight };

// The random bits of this many neighbouring elements come from one call of the generator, 16 for each. The
// first half of the elements takes the words in order, from each word its low half first. The second half
// takes the complement of what the first half takes. That is as random for each element, costs half as much,
// and lets the errors of the two cancel a little (antithetic variates).
constexpr int kElementsPerDraw = 16;

struct RandomBits {
  uint32_t words[4];
};

// Philox4x32 (Salmon, Moraes, Dror, Shaw 2011, "Parallel Random Numbers: As Easy as 1, 2, 3"). 7 rounds are
// the fewest that pass all tests of BigCrush (table 2 there); the usual 10 are a margin that rounding does
// not need.
constexpr int kPhiloxRounds = 7;
constexpr uint32_t kPhiloxMultiplier[2] = {0xd2511f53, 0xcd9e8d57};
constexpr uint32_t kPhiloxIncrement[2] = {0x9e3779b9, 0xbb67ae85};

FUSED_LARS_INLINE uint64_t product(uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH__
  return static_cast<uint64_t>(__umulhi(a, b)) << 32 | a * b;
#else
  return static_cast<uint64_t>(a) * b;
#endif
}

FUSED_LARS_INLINE RandomBits philox(RandomBits counter, uint32_t key0, uint32_t key1) {
  // Numbers, because device code cannot see the array.
  constexpr uint32_t increment0 = kPhiloxIncrement[0], increment1 = kPhiloxIncrement[1];
  auto& [a, b, c, d] = counter.words;
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t product0 = product(kPhiloxMultiplier[0], a), product1 = product(kPhiloxMultiplier[1], c);
    a = static_cast<uint32_t>(product1 >> 32) ^ b ^ key0;
    c = static_cast<uint32_t>(product0 >> 32) ^ d ^ key1;
    b = static_cast<uint32_t>(product1);
    d = static_cast<uint32_t>(product0);
    key0 += increment0;
    key1 += increment1;
  }
  return counter;
}

// What the generator starts from for draw number `draw`: elements draw * kElementsPerDraw and on.
FUSED_LARS_INLINE RandomBits draw_counter(const RngState& rng, RoundedTensor tensor, uint64_t draw) {
  return {static_cast<uint32_t>(draw), static_cast<uint32_t>(draw >> 32), static_cast<uint32_t>(rng.update),
          static_cast<uint32_t>(tensor)};
}

FUSED_LARS_INLINE RandomBits draw_bits(const RngState& rng, RoundedTensor tensor, uint64_t draw) {
  const auto key = static_cast<uint64_t>(rng.key);
  return philox(draw_counter(rng, tensor, draw), static_cast<uint32_t>(key),
                static_cast<uint32_t>(key >> 32));
}

// ---------------------------------------------------------------- 16 bits

FUSED_LARS_INLINE uint32_t float_to_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}
FUSED_LARS_INLINE float bits_to_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// In these functions `random` has 16 bits. An element that the type holds exactly stays as it is, and NaN and
// inf stay what they are.
FUSED_LARS_INLINE uint16_t round_to_bf16(float x, uint32_t random) {
  const uint32_t bits = float_to_bits(x);
  return static_cast<uint16_t>(x != x ? 0x7fc0 : (bits + random) >> 16);
}

// Without a branch, which would keep the compiler from making vectors of a loop.
FUSED_LARS_INLINE uint32_t select(bool condition, uint32_t yes, uint32_t no) {
  return no ^ ((yes ^ no) & (0 - static_cast<uint32_t>(condition)));
}

// 13 of the random bits are used: as many as a normal number loses.
FUSED_LARS_INLINE uint16_t round_to_f16(float x, uint32_t random) {
  const uint32_t bits = float_to_bits(x);
  const uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  const uint32_t added = random >> 3;
  const uint32_t normal = (magnitude + added - 0x38000000) >> 13;
  // Below 2^-14 the last place is 2^-24.
  const bool is_subnormal = magnitude < 0x38800000;
  const float units = bits_to_float(select(is_subnormal, magnitude, 0)) * 0x1p24f;
  const auto subnormal = static_cast<uint32_t>(
      static_cast<int32_t>(units + static_cast<float>(static_cast<int32_t>(added)) * 0x1p-13f));
  const uint32_t special = select(magnitude > 0x7f800000, 0x7e00, 0x7c00);
  const bool is_special = magnitude >= 0x47800000;  // 65536 and more, inf, NaN
  return static_cast<uint16_t>(sign | select(is_special, special, select(is_subnormal, subnormal, normal)));
}

// ---------------------------------------------------------------- 8 bits

// A momentum buffer of int8 holds codes from -127 to 127. Blocks of this many elements, in the order of
// memory, share an fp32 scale: the largest magnitude of the block. The last block of a tensor may be shorter.
constexpr int kScaleBlock = 128;

template <typename Int>
Int scale_blocks(const Int& numel) {
  return (numel + (kScaleBlock - 1)) / kScaleBlock;
}

// An element is (code / 127)^2 * scale, with the sign of the code. Steps are finer for small elements, so one
// large element of a block costs the others less than in a linear code; docs/low_precision.md has figures.
constexpr int kMostCode = 127;
constexpr float kMostSquare = kMostCode * kMostCode;

// How a block is encoded. `gain` is kMostSquare / scale, or 0 if the block has inf or NaN.
struct BlockScale {
  float scale;
  float gain;
};

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kLeastScale = 0x1p-112f;  // of a smaller one, the gain is not finite

// From the largest magnitude of a block, as bits: comparing these as integers orders inf and NaN above all
// numbers.
FUSED_LARS_INLINE BlockScale block_scale(uint32_t largest_bits) {
  // A number times NaN is NaN, so the whole block decodes to NaN.
  if (largest_bits >= 0x7f800000) return {kNaN, 0.0f};
  const float largest = bits_to_float(largest_bits);
  const float scale = largest < kLeastScale ? kLeastScale : largest;
  return {scale, kMostSquare / scale};
}

// The code of an element: that of the next smaller magnitude, or one more with the probability that makes the
// mean right. `random` has 16 bits, and 0x8000 chooses the nearer code. 12 of them are used. That leaves a
// margin for rounding, so that what decode() returned keeps its code.
FUSED_LARS_INLINE int8_t encode(float x, float gain, uint32_t random) {
  const uint32_t bits = float_to_bits(x);
  // A comparison of bits, since x may be NaN, which must not become an integer.
  const float magnitude = bits_to_float(select(gain > 0.0f, bits & 0x7fffffff, 0));
  const float square = magnitude * gain;
  const auto code = static_cast<int32_t>(sqrtf(square));
  const auto root = static_cast<float>(code);
  // (random / 16 + 1/2) * 2^-12, by the bits of 1 + that.
  const float draw = bits_to_float(0x3f800400 | (random & 0xfff0) << 7) - 1.0f;
  const int32_t rounded = code + static_cast<int32_t>(square - root * root > draw * (root + root + 1.0f));
  const auto sign = -static_cast<int32_t>(bits >> 31);
  return static_cast<int8_t>((rounded ^ sign) - sign);
}

// The factor is rounded, and kMostSquare times it is exactly 1. So the largest element is exact.
FUSED_LARS_INLINE float decode(int8_t code, float scale) {
  const int32_t magnitude = code < 0 ? -code : code;
  return static_cast<float>(code * magnitude) * (1.0f / kMostSquare) * scale;
}

}  // namespace fused_lars
