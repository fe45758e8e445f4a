#pragma once

// The kernels of each parameter type are compiled by a file of their own, several files at once.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "launch.h"

namespace fused_lars {

// See find_kernel. Weight is float where the parameter has a master. Instantiated by the step_kernel_*.cu.
template <typename Param, typename Weight = Param>
const Kernel* kernel_of_param(const KernelTypes& types);

}  // namespace fused_lars
