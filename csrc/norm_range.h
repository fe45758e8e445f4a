#pragma once

// Norms over the whole range of a type, where squares have half of it.
//
// A sum of squares is taken plainly first. From the root of the largest number on it overflows, and far below
// 1 its squares lose bits or vanish. Both show in the sum, and then it is taken again of scaled elements.

#include <cmath>
#include <limits>

#include "rule.h"

namespace fused_lars {

// Of the type T that squares are taken and added in.
template <typename T>
struct SquareRange;
template <>
struct SquareRange<float> {
  // Where subnormal numbers are flushed to 0, each square and each addition may lose 2^-126: at most 2^-29 of
  // what is left from here on. An element.
  static constexpr double kLeast = 0x1p-96;
  static constexpr double kBeyond = std::numeric_limits<double>::infinity();
  // Brings elements from 2^-149 on, and up to 2^128, to where 2^31 of their squares can be added.
  static constexpr double kScale = 0x1p90;
};
template <>
struct SquareRange<double> {
  static constexpr double kLeast = 0x1p-900;
  static constexpr double kBeyond = 0x1p900;  // leaves room to add up sums
  static constexpr double kScale = 0x1p600;
};

// What elements are to be multiplied by, a power of two, given the plain sum of their squares: 1 where that
// is right. A sum with inf or NaN among its elements stays inf or NaN.
template <typename T>
FUSED_LARS_INLINE double square_scale(double sum, double count) {
  using Range = SquareRange<T>;
  if (sum >= count * Range::kLeast && sum < Range::kBeyond) return 1.0;
  return sum < 1.0 ? Range::kScale : 1.0 / Range::kScale;
}

}  // namespace fused_lars
