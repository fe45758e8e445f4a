#pragma once

// The checks of an op's tensor arguments. All of them run before anything is written. overlap.h finds tensors
// that share memory.

#include "fused_lars/ops.h"
#include "step.h"

namespace fused_lars {

// Fills step.tensors: gives each parameter its gradient and, from the state lists, the state that its group
// needs. Then checks the whole step. step.groups and the optional tensors must be set before. An error names
// the tensor by list and index, and says what the tensor is and what is allowed.
void check_and_assemble(const StepLists& lists, Step& step);

// The same for squared_norms: fills params, grads and group_of of a call whose other fields are set.
void check_and_assemble(at::TensorList params, at::TensorList grads, at::IntArrayRef group_sizes,
                        NormCall& call);

// Throws InvalidTensor if autograd would refuse to write one of the tensors of a checked step.
void check_autograd_allows(const Step& step);

bool is_parameter_dtype(at::ScalarType dtype);

}  // namespace fused_lars
