#pragma once

#include <cstdint>

namespace fused_lars {

// The element types that a step computes with, where no ATen is included.
enum class Element : uint8_t { f32, f64, f16, bf16 };

}  // namespace fused_lars
