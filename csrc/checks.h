#pragma once

// Every check of an op's tensor arguments, but for overlap.h. All of them run before anything is written.

#include "step.h"

namespace fused_lars {

// The tensor lists of the step ops, as their schema has them.
struct StepLists {
  at::TensorList params, grads, momentum_buffers, master_params, steps;
  at::IntArrayRef group_sizes;

  // Of tensors.
  size_t count() const {
    return params.size() + grads.size() + momentum_buffers.size() + master_params.size() + steps.size();
  }
};

// Hands the compact state lists out to the parameters that need them and fills step.tensors. Throws an
// error that names the tensor by list and index, what it is and what is allowed; step.groups and the
// optional tensors must be set.
void check_and_assemble(const StepLists& lists, Step& step);

// The same for the norms op: fills params, grads and group_of; the rest of the call must be set.
void check_and_assemble(at::TensorList params, at::TensorList grads, at::IntArrayRef group_sizes,
                        NormCall& call);

// For a checked step that autograd follows: throws where autograd would refuse to write a tensor.
void check_autograd_allows(const Step& step);

bool is_parameter_dtype(at::ScalarType dtype);

}  // namespace fused_lars
