#pragma once

// The kernel: persistent blocks that work off items in the order of order.h.
//
// A norm item sums the squares of one tile, writes the sums to the workspace and counts itself as done. The
// block that does the last norm item of a tensor adds the tensor's sums in the order of its tiles and
// publishes the trust ratio. The tensor's updates wait for that ratio. A tensor of one tile has no norm item:
// its update item takes the norms from registers.
//
// Between a tile's norms and its update, weights and gradients stay in shared memory (a stage). They cross
// the L2 once, as in an update without norms. That matters on GPUs whose L2 has two parts: the link between
// them carries half of all traffic, whether it hits or not (docs/performance.md).

#include "dispatcher.cuh"

namespace fused_lars {

constexpr int kBlocksPerMultiprocessor = 2;

// The last block to leave zeroes what is left of the workspace and counts the step.
template <typename Types>
__device__ __forceinline__ void leave(const Parameters& p) {
  __shared__ bool is_last_block;
  if (threadIdx.x == kWorkers) {  // of the dispatcher, which has read what is zeroed here
    const auto before =
        DeviceAtomic<uint32_t>(*p.workspace.finished).fetch_add(1, cuda::memory_order_acq_rel);
    is_last_block = before == gridDim.x - 1;
  }
  __syncthreads();
  if (!is_last_block) return;
  for (uint32_t tensor = threadIdx.x; tensor < p.order.tensors; tensor += kThreads) {
    p.workspace.ratios[tensor] = 0;
    auto* step = p.pointer<float>(p.steps, tensor);
    if (step != nullptr) *step += 1.0f;
    if constexpr (Types::kMayRound) {
      auto* rng = p.pointer<int64_t>(p.rng_states, tensor);
      if (rng != nullptr) rng[1] += 1;  // RngState::update
    }
  }
  if (threadIdx.x == 0) *p.workspace.tickets = *p.workspace.finished = 0;
}

template <typename Types>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    step_kernel(const __grid_constant__ Parameters p) {
  // Any value but 0: it may be a sum over devices.
  if (p.found_inf != nullptr && *p.found_inf != 0.0f) return;

  __shared__ BlockShared<Types> shared;
  extern __shared__ __align__(16) unsigned char stages[];
  if (threadIdx.x < kWorkers) {
    work_off(shared, stages);
  } else {
    dispatch(p, shared);
  }
  leave<Types>(p);
}

}  // namespace fused_lars
