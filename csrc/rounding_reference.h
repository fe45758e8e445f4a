#pragma once

// What rounding.h does, in ATen operators: for the reference step, and for momentum that is converted.

#include <ATen/core/Tensor.h>

#include "rounding.h"

namespace fused_lars {

// 16 random bits for each element of a parameter, as an int32 vector in the order of memory.
at::Tensor random_bits(const at::Tensor& rng_state, RoundedTensor tensor, const c10::SymInt& numel);

// The elements of `values` in the order in which those of `like` lie in memory, as a vector. If `like` is not
// dense, its order is that of its dimensions.
at::Tensor in_memory_order(const at::Tensor& values, const at::Tensor& like);
// The reverse.
at::Tensor from_memory_order(const at::Tensor& vector, const at::Tensor& like);

// Rounds an fp32 tensor to fp16 or bf16 with random bits of the same shape.
at::Tensor round_stochastically(const at::Tensor& values, at::ScalarType dtype, const at::Tensor& random);

struct EncodedMomentum {
  at::Tensor codes, scale;
};

// Encodes an fp32 vector. `random` has a number for each element; undefined, the codes are the nearest ones.
EncodedMomentum encode_vector(const at::Tensor& values, const at::Tensor& random);

// Encodes momentum of any floating-point dtype to the nearest codes, which have its layout if that is dense.
// What decode_momentum returned is encoded as it was before, unless its layout has changed.
EncodedMomentum encode_momentum(const at::Tensor& momentum);

// Returns fp32 momentum with the sizes and strides of `codes`.
at::Tensor decode_momentum(const at::Tensor& codes, const at::Tensor& scale);

}  // namespace fused_lars
