#pragma once

#include "step.h"

namespace fused_lars {

// Runs `backend` on a step whose tensors are all dense runs of elements in the layout of their weight.
// Tensors that already are, the rule in training, pass through. Others (a gradient that inductor made
// channels_last, a gradient expanded from a sum, a parameter that is a column of a larger tensor) go
// through a dense copy, and what the step wrote is copied back.
void run_dense(void (*backend)(const Step&), Step& step);
at::Tensor run_dense(NormKernel kernel, NormCall& call);

}  // namespace fused_lars
