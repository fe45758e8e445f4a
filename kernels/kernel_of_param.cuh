#pragma once

// Defines kernel_of_param, and with it the kernel's instantiations: one for each combination of element
// types. Everything else is decided at run time.

#include <type_traits>

#include "kernel_of_param.h"
#include "step_kernel.cuh"

namespace fused_lars {

template <typename T>
constexpr Element kElementOf = std::is_same_v<T, double>          ? Element::f64
                               : std::is_same_v<T, __half>        ? Element::f16
                               : std::is_same_v<T, __nv_bfloat16> ? Element::bf16
                               : std::is_same_v<T, int8_t>        ? Element::i8
                                                                  : Element::f32;

template <typename Types>
const Kernel* kernel() {
  static const Kernel kernel = {
      .function = step_kernel<Types>,
      .threads = kThreads,
      .tile = Types::kTile,
      .footprint =
          {
              .blocks_per_multiprocessor = kBlocksPerMultiprocessor,
              .shared_bytes = sizeof(BlockShared<Types>) + 16,
              .stage_bytes = Types::kStageBytes,
          },
  };
  return &kernel;
}

template <typename... Ts>
struct TypeList {};

// The types that momentum_dtypes in csrc/step.h allows.
template <typename Param>
struct MomentumTypes {
  using List = TypeList<Param, float, int8_t>;
};
template <>
struct MomentumTypes<float> {
  using List = TypeList<float, __nv_bfloat16, __half, int8_t>;
};
template <>
struct MomentumTypes<double> {
  using List = TypeList<double, float>;
};

template <typename Param, typename Weight, typename Grad, typename... MomentumBuffers>
const Kernel* kernel_of_grad(Element momentum_buffer, TypeList<MomentumBuffers...>) {
  const Kernel* found = nullptr;
  const auto find = [&]<typename MomentumBuffer>(TypeList<MomentumBuffer>) {
    if (momentum_buffer != kElementOf<MomentumBuffer>) return;
    found = kernel<TensorTypes<Param, Grad, MomentumBuffer, Weight>>();
  };
  (find(TypeList<MomentumBuffers>()), ...);
  return found;
}

// A gradient has the parameter's type or fp32.
template <typename Param, typename Weight>
const Kernel* kernel_of_param(const KernelTypes& types) {
  const typename MomentumTypes<Param>::List momentum_types;
  if (types.grad == kElementOf<Param>) {
    return kernel_of_grad<Param, Weight, Param>(types.momentum_buffer, momentum_types);
  }
  if (types.grad == Element::f32) {
    return kernel_of_grad<Param, Weight, float>(types.momentum_buffer, momentum_types);
  }
  return nullptr;
}

}  // namespace fused_lars
