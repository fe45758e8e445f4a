#pragma once

// The inner loops of the CPU step, on one tile of one tensor. tile_kernels.cpp is compiled once for each
// instruction set and the best of them is chosen when the library runs. This header includes no ATen: code
// inlined from there, compiled for AVX-512, could be the copy that the linker keeps for every processor.

#include <cstdint>

#include "../element.h"
#include "../rule.h"

namespace fused_lars {

// A pointer to elements of a type known at run time.
struct ElementPointer {
  void* data = nullptr;
  Element element = Element::f32;
};

struct SquaredNorms {
  double weight = 0.0;
  double grad = 0.0;
};

// The tensors of one parameter, each a run of the same number of elements.
struct TensorPointers {
  ElementPointer weight;           // read and written: the master where there is one
  ElementPointer grad;             // read
  ElementPointer momentum_buffer;  // read and written; null without momentum
  ElementPointer low_precision;    // written: the parameter of a master; null without
};

// Where the norm of a gradient is that of the decayed gradient; null where it is not.
using DecayedNorm = const DecayedGradient<double>*;

struct TileKernels {
  // The sums of squares of `count` elements of a weight and its gradient from `offset`, in fp32 or, for fp64
  // weights, in fp64; in a fixed number of lanes whatever the vector width, so the bits do not depend on the
  // processor.
  using NormTile = SquaredNorms(ElementPointer weight, ElementPointer grad, DecayedNorm decayed,
                                int64_t offset, int64_t count);
  NormTile* squared_norms_f32;
  NormTile* squared_norms_f64;
  // The same of elements that are multiplied by a power of two before: see norm_range.h.
  using ScaledNormTile = SquaredNorms(ElementPointer weight, ElementPointer grad, DecayedNorm decayed,
                                      int64_t offset, int64_t count, double weight_scale, double grad_scale);
  ScaledNormTile* scaled_squared_norms_f32;
  ScaledNormTile* scaled_squared_norms_f64;
  // Applies the rule to `count` elements from `offset`. fp64 weights take the second, others the first.
  void (*update_f32)(const Coefficients<float>& c, const TensorPointers& tensors, int64_t offset,
                     int64_t count);
  void (*update_f64)(const Coefficients<double>& c, const TensorPointers& tensors, int64_t offset,
                     int64_t count);
  const char* name;  // "avx512", "avx2" or "baseline"
};

// The kernels for the processor that runs this.
const TileKernels& tile_kernels();

}  // namespace fused_lars
