#pragma once

#include <cstdint>

namespace fused_lars {

// The element types of the tensors of a step, for code that includes no ATen. `element` in step.h converts
// from ATen's.
enum class Element : uint8_t { f32, f64, f16, bf16, i8 };

}  // namespace fused_lars
