#include "kernel_of_param.h"

namespace fused_lars {

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
    case Element::i8:
      return nullptr;
  }
  return nullptr;
}

}  // namespace fused_lars
