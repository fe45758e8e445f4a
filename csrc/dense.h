#pragma once

#include "step.h"

namespace fused_lars {

// Runs `backend` on a step in which the tensors of a parameter are dense and have one layout. In training
// most tensors are so already, and are passed as they are. The others are copied to dense memory first, and
// what the step wrote is copied back. Examples are a gradient that Inductor made channels_last, a gradient
// expanded from a sum, and a parameter that is a column of a larger tensor.
void run_dense(void (*backend)(const Step&), Step& step);
at::Tensor run_dense(NormKernel kernel, NormCall& call);

}  // namespace fused_lars
