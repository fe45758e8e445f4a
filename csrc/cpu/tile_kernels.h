#pragma once

// The inner loops of the CPU step, on one tile of one parameter. tile_kernels.cpp is compiled once for each
// instruction set, and the best variant is chosen when the library runs. This header includes no ATen.
// Otherwise an inline function of ATen would be compiled for AVX-512 too, and the linker could keep that copy
// for all processors.

#include <cstdint>

#include "../element.h"
#include "../rounding.h"
#include "../rule.h"

namespace fused_lars {

// A pointer to elements whose type is known at run time only.
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
  ElementPointer weight;            // read and written: the master where there is one
  ElementPointer grad;              // read
  ElementPointer momentum_buffer;   // read and written; null without momentum
  ElementPointer low_precision;     // written: the parameter of a master; null without
  float* momentum_scale = nullptr;  // read and written: of an int8 buffer; null without
  RngState rng = {};
  bool rounds_weight_stochastically = false, rounds_momentum_stochastically = false;
};

// The factors of the decayed gradient whose norm is taken; null without decayed_norm.
using DecayedNorm = const DecayedGradient<double>*;

struct TileKernels {
  // Returns the sums of squares of `count` elements from `offset`, of a weight and its gradient. fp64 weights
  // take the kernel that computes in fp64, others the one that computes in fp32. The number of lanes is
  // fixed, whatever the vector width, so the bits do not depend on the processor.
  using NormTile = SquaredNorms(ElementPointer weight, ElementPointer grad, DecayedNorm decayed,
                                int64_t offset, int64_t count);
  NormTile* squared_norms_f32;
  NormTile* squared_norms_f64;
  // The same for elements that are first multiplied by a power of two: see norm_range.h.
  using ScaledNormTile = SquaredNorms(ElementPointer weight, ElementPointer grad, DecayedNorm decayed,
                                      int64_t offset, int64_t count, double weight_scale, double grad_scale);
  ScaledNormTile* scaled_squared_norms_f32;
  ScaledNormTile* scaled_squared_norms_f64;
  // Apply the rule to `count` elements from `offset`, a multiple of kScaleBlock. fp64 weights take the
  // second, others the first.
  void (*update_f32)(const Coefficients<float>& c, const TensorPointers& tensors, int64_t offset,
                     int64_t count);
  void (*update_f64)(const Coefficients<double>& c, const TensorPointers& tensors, int64_t offset,
                     int64_t count);
  const char* name;  // "avx512", "avx2" or "baseline"
};

// The best kernels for the processor that this runs on.
const TileKernels& tile_kernels();

}  // namespace fused_lars
