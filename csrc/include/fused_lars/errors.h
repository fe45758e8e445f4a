#pragma once

#include <string>
#include <utility>

#include <c10/util/Exception.h>
#include <c10/util/StringUtil.h>

#include "fused_lars/export.h"

namespace fused_lars {

// The base of every error that this library throws. In Python it is a ValueError.
struct FUSED_LARS_API Error : c10::ValueError {
  using c10::ValueError::ValueError;
};

struct FUSED_LARS_API InvalidLearningRate : Error {
  using Error::Error;
};
struct FUSED_LARS_API InvalidMomentum : Error {
  using Error::Error;
};
struct FUSED_LARS_API InvalidWeightDecay : Error {
  using Error::Error;
};
struct FUSED_LARS_API InvalidTrustCoefficient : Error {
  using Error::Error;
};
// eps or dampening out of range, options that exclude each other, or a list of the wrong length.
struct FUSED_LARS_API InvalidOption : Error {
  using Error::Error;
};
// Two tensors that belong together differ in shape. The message has both shapes.
struct FUSED_LARS_API ShapeMismatch : Error {
  using Error::Error;
};
// A tensor that is undefined, has a wrong dtype, device or layout, or shares memory with another, or a list
// with the wrong number of tensors.
struct FUSED_LARS_API InvalidTensor : Error {
  using Error::Error;
};
// A leaf that requires grad has no gradient. The message names its node.
struct FUSED_LARS_API MissingGradient : Error {
  using Error::Error;
};
// An index that is outside of a graph's list of leaves. The message has the index and the length of the list.
struct FUSED_LARS_API InvalidNode : Error {
  using Error::Error;
};

}  // namespace fused_lars

// Throws ERROR, with the other arguments joined to a message, unless CONDITION holds. It is a macro so that
// the message is built on failure only, and names the place in the source that threw.
#define FUSED_LARS_CHECK(condition, ERROR, ...)                                                  \
  do {                                                                                           \
    if (!(condition)) [[unlikely]] {                                                             \
      throw ERROR({__func__, __FILE__, static_cast<uint32_t>(__LINE__)}, c10::str(__VA_ARGS__)); \
    }                                                                                            \
  } while (false)
