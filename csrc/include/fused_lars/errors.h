#pragma once

#include <string>
#include <utility>

#include <c10/util/Exception.h>
#include <c10/util/StringUtil.h>

namespace fused_lars {

// The base of every error this library throws on purpose. A ValueError in Python.
struct Error : c10::ValueError {
  using c10::ValueError::ValueError;
};

struct InvalidLearningRate : Error {
  using Error::Error;
};
struct InvalidMomentum : Error {
  using Error::Error;
};
struct InvalidWeightDecay : Error {
  using Error::Error;
};
struct InvalidTrustCoefficient : Error {
  using Error::Error;
};
// eps, dampening, or options that exclude each other.
struct InvalidOption : Error {
  using Error::Error;
};
// Two tensors that belong together differ in shape; the message has both shapes.
struct ShapeMismatch : Error {
  using Error::Error;
};
// A tensor of the wrong dtype, device, layout or number.
struct InvalidTensor : Error {
  using Error::Error;
};
// A leaf that requires grad has none; the message names its node.
struct MissingGradient : Error {
  using Error::Error;
};
// An index outside of a graph's list of leaves; the message has both.
struct InvalidNode : Error {
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
