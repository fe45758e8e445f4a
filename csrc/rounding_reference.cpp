#include "rounding_reference.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <numeric>

#include "fused_lars/errors.h"

namespace fused_lars {
namespace {

// The dimensions of a tensor, the outermost in memory first.
std::vector<int64_t> memory_order(const at::Tensor& tensor) {
  std::vector<int64_t> order(tensor.dim());
  std::iota(order.begin(), order.end(), 0);
  if (!tensor.is_non_overlapping_and_dense()) return order;
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return tensor.sym_stride(a) > tensor.sym_stride(b); });
  return order;
}

at::Tensor right_shift(const at::Tensor& x, int64_t bits) { return at::bitwise_right_shift(x, bits); }

// The halves of a product of two numbers of 32 bits. It is made of smaller products: int64 would overflow.
struct Product {
  at::Tensor low, high;
};
Product multiply(const at::Tensor& a, uint32_t b) {
  const auto low = a * static_cast<int64_t>(b & 0xffff), high = a * static_cast<int64_t>(b >> 16);
  return {(low + (high & 0xffff) * 0x10000) & 0xffffffff, right_shift(high + right_shift(low, 16), 16)};
}

at::Tensor as_float(const at::Tensor& bits) { return bits.view(at::kFloat); }
at::Tensor as_bits(const at::Tensor& values) { return values.view(at::kInt); }

at::Tensor round_to_bf16(const at::Tensor& values, const at::Tensor& random) {
  const auto rounded = right_shift(as_bits(values) + random, 16).to(at::kShort).view(at::kBFloat16);
  return at::where(values.isnan(), at::full_like(rounded, kNaN), rounded);
}

at::Tensor round_to_f16(const at::Tensor& values, const at::Tensor& random) {
  const auto magnitude = as_bits(values) & 0x7fffffff;
  const auto added = right_shift(random, 3);
  const auto normal = right_shift(magnitude + added - 0x38000000, 13);
  const auto is_subnormal = magnitude < 0x38800000;
  const auto units = at::where(is_subnormal, values.abs(), 0.0) * 0x1p24;
  const auto subnormal = (units + added.to(at::kFloat) * 0x1p-13).to(at::kInt);
  const auto rounded = at::where(is_subnormal, subnormal, normal);
  const auto infinite = at::where(magnitude >= 0x47800000, at::full_like(rounded, 0x7c00), rounded);
  const auto signed_zero = right_shift(as_bits(values), 16) & ~0x7fff;
  const auto result = (infinite | signed_zero).to(at::kShort).view(at::kHalf);
  return at::where(values.isnan(), at::full_like(result, kNaN), result);
}

}  // namespace

at::Tensor random_bits(const at::Tensor& rng_state, RoundedTensor tensor, const c10::SymInt& numel) {
  const auto key = rng_state.select(0, 0), update = rng_state.select(0, 1), first = rng_state.select(0, 2);
  const auto draws = at::arange(numel / kElementsPerDraw + 2, rng_state.options()) + right_shift(first, 4);
  static_assert(kElementsPerDraw == 16);
  auto a = draws & 0xffffffff, b = right_shift(draws, 32), c = (update & 0xffffffff).expand_as(draws),
       d = at::full_like(draws, static_cast<int64_t>(tensor));
  auto key0 = key & 0xffffffff, key1 = right_shift(key, 32) & 0xffffffff;
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const auto product0 = multiply(a, kPhiloxMultiplier[0]), product1 = multiply(c, kPhiloxMultiplier[1]);
    a = product1.high ^ b ^ key0;
    c = product0.high ^ d ^ key1;
    b = product1.low;
    d = product0.low;
    key0 = (key0 + static_cast<int64_t>(kPhiloxIncrement[0])) & 0xffffffff;
    key1 = (key1 + static_cast<int64_t>(kPhiloxIncrement[1])) & 0xffffffff;
  }
  const auto words = at::stack({a, b, c, d}, 1);
  const auto half =
      at::stack({words & 0xffff, right_shift(words, 16)}, 2).reshape({-1, kElementsPerDraw / 2});
  const auto bits = at::cat({half, half ^ 0xffff}, 1).reshape(-1);
  return bits.index_select(0, at::arange(numel, rng_state.options()) + (first & (kElementsPerDraw - 1)))
      .to(at::kInt);
}

at::Tensor in_memory_order(const at::Tensor& values, const at::Tensor& like) {
  return values.permute(memory_order(like)).reshape(-1);
}

at::Tensor from_memory_order(const at::Tensor& vector, const at::Tensor& like) {
  const auto order = memory_order(like);
  std::vector<c10::SymInt> sizes;
  std::vector<int64_t> inverse(order.size());
  for (size_t i = 0; i < order.size(); ++i) {
    sizes.push_back(like.sym_size(order[i]));
    inverse[order[i]] = static_cast<int64_t>(i);
  }
  return vector.view_symint(sizes).permute(inverse);
}

at::Tensor round_stochastically(const at::Tensor& values, at::ScalarType dtype, const at::Tensor& random) {
  return dtype == at::kHalf ? round_to_f16(values, random) : round_to_bf16(values, random);
}

EncodedMomentum encode_vector(const at::Tensor& values, const at::Tensor& random) {
  const auto numel = values.sym_numel();
  const auto blocks = scale_blocks(numel);
  const auto in_blocks = [&](const at::Tensor& vector) {
    return at::constant_pad_nd_symint(vector, {0, blocks * kScaleBlock - numel})
        .view_symint({blocks, kScaleBlock});
  };
  const auto of_blocks = in_blocks(values);
  const auto bits = (as_bits(of_blocks) & 0x7fffffff).amax(1);
  const auto is_finite = bits < 0x7f800000;
  const auto scale = at::where(is_finite, as_float(bits), 1.0).to(at::kFloat).clamp_min(kLeastScale);
  // Not divided by a Scalar: on CUDA that is a multiplication by its reciprocal.
  const auto gain = (at::full_like(scale, kMostSquare) / scale).unsqueeze(1);
  const auto square = at::where(is_finite.unsqueeze(1), of_blocks.abs() * gain, 0.0).to(at::kFloat);
  const auto root = square.sqrt().floor();
  const auto nearest = at::full({}, 0x8000 >> 4, values.options().dtype(at::kInt));
  const auto draw = random.defined() ? right_shift(in_blocks(random), 4) : nearest;
  const auto up = square - root * root > (draw.to(at::kFloat) * 0x1p-12 + 0x1p-13) * (root + root + 1.0);
  const auto codes = ((root + up) * at::where(of_blocks < 0, -1.0, 1.0)).to(at::kChar);
  return {codes.view(-1).slice_symint(0, 0, numel), at::where(is_finite, scale, kNaN).to(at::kFloat)};
}

EncodedMomentum encode_momentum(const at::Tensor& momentum) {
  FUSED_LARS_CHECK(momentum.is_floating_point(), InvalidTensor, "momentum has dtype ", momentum.scalar_type(),
                   "; allowed: a floating-point dtype");
  // Dense even if the momentum has gaps.
  auto codes = at::empty_like(momentum, momentum.options().dtype(at::kChar));
  const auto encoded = encode_vector(in_memory_order(momentum.to(at::kFloat), codes), {});
  codes.copy_(from_memory_order(encoded.codes, codes));
  return {codes, encoded.scale};
}

at::Tensor decode_momentum(const at::Tensor& codes, const at::Tensor& scale) {
  const auto numel = codes.sym_numel();
  const auto blocks = scale_blocks(numel);
  FUSED_LARS_CHECK(codes.scalar_type() == at::kChar && codes.is_non_overlapping_and_dense(), InvalidTensor,
                   "codes is ", codes.scalar_type(), " with strides ", codes.sym_strides(),
                   "; expected a dense tensor of Char");
  FUSED_LARS_CHECK(scale.scalar_type() == at::kFloat && scale.dim() == 1 && scale.sym_numel() == blocks,
                   InvalidTensor, "scale is ", scale.scalar_type(), scale.sym_sizes(),
                   "; expected a vector of Float with ", blocks, " elements");
  const auto scales = scale.unsqueeze(1).expand_symint({blocks, kScaleBlock}).reshape(-1);
  const auto code = in_memory_order(codes, codes).to(at::kFloat);
  const auto factor = code * code.abs() * (1.0f / kMostSquare);
  const auto vector = factor * scales.slice_symint(0, 0, numel);
  return at::empty_like(codes, codes.options().dtype(at::kFloat)).copy_(from_memory_order(vector, codes));
}

}  // namespace fused_lars
