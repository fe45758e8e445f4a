#pragma once

// The host's side of the kernel, without ATen: the interface of libfused_lars_kernels.so.

#include <cstdint>
#include <vector>

#include <cuda_runtime_api.h>

#include "fused_lars/export.h"
#include "parameters.h"
#include "plan.h"

namespace fused_lars {

// The element types that the tensors of a launch have in common.
struct KernelTypes {
  Element param;
  Element grad;
  Element momentum_buffer;
  bool master;  // fp32

  bool operator==(const KernelTypes&) const = default;
};

// The kernel for some element types, and what its launcher must know.
struct Kernel {
  void (*function)(Parameters);
  uint32_t threads;
  uint32_t tile;  // elements
  Footprint footprint;
};

// Null where there is none: the types that checks.h lets the step have all have one.
const Kernel* find_kernel(const KernelTypes& types);

struct LaunchTensor : TensorMemory {
  void* param;            // used where the weight is its master
  float* step;            // null without dampening
  float* momentum_scale;  // of an int8 momentum buffer, else null
  int64_t* rng_state;     // null if nothing is rounded stochastically
  int64_t numel;
  uint32_t index;  // in trust_ratios, layer_norms and squared_norms
  uint32_t group;
};

// Tensors of the same element types.
struct Bucket {
  KernelTypes types;
  std::vector<LaunchTensor> tensors;
};

// What all launches of a step have in common.
struct LaunchOptions {
  Pass pass = Pass::step;
  const float* grad_scale = nullptr;
  const float* found_inf = nullptr;
  double* squared_norms = nullptr;  // written by Pass::norms, read by Pass::update
  double* trust_ratios = nullptr;
  double* layer_norms = nullptr;
  bool masters_follow = false;  // see take_over in csrc/step.h
  DeviceSize device = {1, 0, 0};
};

// The workspace that launching the bucket takes: int32 words, all zero, which it leaves zero.
FUSED_LARS_API int64_t workspace_words(const Bucket& bucket, const std::vector<GroupRow>& groups,
                                       const LaunchOptions& options);

// Launches the bucket on `stream`, in one launch if the parameter space holds it.
FUSED_LARS_API cudaError_t launch(const Bucket& bucket, const std::vector<GroupRow>& groups,
                                  const LaunchOptions& options, void* workspace, cudaStream_t stream);

}  // namespace fused_lars
