#pragma once

#include <string>
#include <utility>

#include <c10/util/Exception.h>
#include <c10/util/StringUtil.h>

#include "fused_lars/export.h"

namespace fused_lars {

// The base of every error this library throws on purpose. A ValueError in Python.
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
// eps, dampening, or options that exclude each other.
struct FUSED_LARS_API InvalidOption : Error {
  using Error::Error;
};
// Two tensors that belong together differ in shape; the message has both shapes.
struct FUSED_LARS_API ShapeMismatch : Error {
  using Error::Error;
};
// A tensor of the wrong dtype, device, layout or number.
struct FUSED_LARS_API InvalidTensor : Error {
  using Error::Error;
};
// A leaf that requires grad has none; the message names its node.
struct FUSED_LARS_API MissingGradient : Error {
  using Error::Error;
};
// An index outside of a graph's list of leaves; the message has both.
struct FUSED_LARS_API InvalidNode : Error {
  using Error::Error;
};

}  // namespace fused_lars

// Throws ERROR with the concatenation of the remaining arguments unless CONDITION holds. A macro, so
// that the message is built only on failure and carries the place that found the fault.
#define FUSED_LARS_CHECK(condition, ERROR, ...)                                                  \
  do {                                                                                           \
    if (!(condition)) [[unlikely]] {                                                             \
      throw ERROR({__func__, __FILE__, static_cast<uint32_t>(__LINE__)}, c10::str(__VA_ARGS__)); \
    }                                                                                            \
  } while (false)
