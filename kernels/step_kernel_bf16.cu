#include "kernel_of_param.cuh"

namespace fused_lars {

template const Kernel* kernel_of_param<__nv_bfloat16>(const KernelTypes&);
template const Kernel* kernel_of_param<__nv_bfloat16, float>(const KernelTypes&);

}  // namespace fused_lars
