#include "kernel_of_param.cuh"

namespace fused_lars {

template const Kernel* kernel_of_param<double>(const KernelTypes&);

}  // namespace fused_lars
