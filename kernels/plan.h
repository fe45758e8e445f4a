#pragma once

// How much of a device a launch of the CUDA step takes. This follows from the sizes of the device and of a
// tile alone, so it is tested on the host.

#include <algorithm>
#include <cstdint>

#include "order.h"

namespace fused_lars {

// The most tiles that a block keeps. Four of fp32 take all shared memory of an H100.
constexpr int kMostStages = 4;

struct DeviceSize {
  int64_t multiprocessors;
  int64_t shared_bytes;           // of a multiprocessor
  int64_t reserved_shared_bytes;  // of these, what each block costs beside its own
};

// What a block of a kernel takes.
struct Footprint {
  int64_t blocks_per_multiprocessor;
  int64_t shared_bytes;  // without stages
  int64_t stage_bytes;   // weights and gradients of a tile
};

inline int64_t resident_blocks(const Footprint& kernel, const DeviceSize& device) {
  return device.multiprocessors * kernel.blocks_per_multiprocessor;
}

// As many as the shared memory of a multiprocessor has room for, beside its other blocks.
inline int64_t stages_of_block(const Footprint& kernel, const DeviceSize& device) {
  const int64_t of_block = device.shared_bytes / kernel.blocks_per_multiprocessor;
  const int64_t room = of_block - device.reserved_shared_bytes - kernel.shared_bytes;
  return std::clamp<int64_t>(room / kernel.stage_bytes, 0, kMostStages);
}

// The most tiles of one tensor that are kept. The next tensor gets at least the eighth that is left, so that
// memory is busy while the norms of the first are completed.
inline int64_t most_kept_tiles(const Footprint& kernel, const DeviceSize& device, int64_t stages) {
  return resident_blocks(kernel, device) * stages / 8 * 7;
}

// The items of a tensor whose norms are needed, in a launch for the whole step.
inline ItemCounts items_of_step(uint32_t tiles, uint32_t most_kept_tiles) {
  if (tiles == 1) return {0, 1};  // its update item takes the norms
  return {tiles, tiles > most_kept_tiles ? tiles - most_kept_tiles : 0};
}

}  // namespace fused_lars
