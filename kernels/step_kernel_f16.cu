#include "kernel_of_param.cuh"

namespace fused_lars {

template const Kernel* kernel_of_param<__half>(const KernelTypes&);
template const Kernel* kernel_of_param<__half, float>(const KernelTypes&);

}  // namespace fused_lars
