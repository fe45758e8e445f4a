#pragma once

// Norms that are right over the whole range of a type.
//
// The square of a large element overflows, and the square of a small one loses bits or becomes 0. So a step
// first adds the squares of the elements as they are. Where the sum shows that they were too large or too
// small, it adds the squares again, of elements that were multiplied by a power of two.

#include <cmath>
#include <limits>

#include "rule.h"

namespace fused_lars {

// For sums of squares in type T: a sum is right as it is from kLeast, for each element, up to kBeyond. Other
// sums are taken again of elements that were multiplied by kScale, or by 1 / kScale where they were too
// large.
template <typename T>
struct SquareRange;
template <>
struct SquareRange<float> {
  // A processor that flushes subnormal numbers to 0 may lose 2^-126 in each square and in each addition. From
  // this sum on, that is at most 2^-29 of it.
  static constexpr double kLeast = 0x1p-96;
  static constexpr double kBeyond = std::numeric_limits<double>::infinity();
  // Elements lie between 2^-149 and 2^128. Once scaled, 2^31 of their squares can be added.
  static constexpr double kScale = 0x1p90;
};
template <>
struct SquareRange<double> {
  static constexpr double kLeast = 0x1p-900;
  static constexpr double kBeyond = 0x1p900;  // the sums of tiles are added up, which needs room above
  static constexpr double kScale = 0x1p600;
};

// The power of two to multiply `count` elements by, given the sum of their squares as they are. It is 1 where
// that sum is right. If an element is inf or NaN, the scaled sum is inf or NaN too.
template <typename T>
FUSED_LARS_INLINE double square_scale(double sum, double count) {
  using Range = SquareRange<T>;
  if (sum >= count * Range::kLeast && sum < Range::kBeyond) return 1.0;
  return sum < 1.0 ? Range::kScale : 1.0 / Range::kScale;
}

}  // namespace fused_lars
