// The kernel's instantiations: one for each combination of element types, everything else is decided at run
// time.

#include "launch.h"
#include "step_kernel.cuh"

namespace fused_lars {
namespace {

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

// Gradient and momentum have the parameter's type or fp32.
template <typename Param, typename Weight = Param>
const Kernel* kernel_of_param(const KernelTypes& types) {
  const bool own_grad = types.grad == types.param, own_momentum = types.momentum_buffer == types.param;
  if (!own_grad && types.grad != Element::f32) return nullptr;
  if (!own_momentum && types.momentum_buffer != Element::f32) return nullptr;
  if (own_grad && own_momentum) return kernel<TensorTypes<Param, Param, Param, Weight>>();
  if (own_grad) return kernel<TensorTypes<Param, Param, float, Weight>>();
  if (own_momentum) return kernel<TensorTypes<Param, float, Param, Weight>>();
  return kernel<TensorTypes<Param, float, float, Weight>>();
}

}  // namespace

const Kernel* find_kernel(const KernelTypes& types) {
  switch (types.param) {
    case Element::f32:
      return types.master ? nullptr : kernel_of_param<float>(types);
    case Element::f64:
      return types.master ? nullptr : kernel_of_param<double>(types);
    case Element::f16:
      return types.master ? kernel_of_param<__half, float>(types) : kernel_of_param<__half>(types);
    case Element::bf16:
      return types.master ? kernel_of_param<__nv_bfloat16, float>(types)
                          : kernel_of_param<__nv_bfloat16>(types);
  }
  return nullptr;
}

}  // namespace fused_lars
