#include "kernel_of_param.cuh"

namespace fused_lars {

template const Kernel* kernel_of_param<float>(const KernelTypes&);

}  // namespace fused_lars
