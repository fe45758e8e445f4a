#pragma once

// How many blocks a launch of the CUDA step has, and how far its norms run ahead of its updates. This follows
// from the sizes of the device and of a tile alone, so it is tested on the host.

#include <algorithm>
#include <cstdint>

#include "order.h"

namespace fused_lars {

struct DeviceSize {
  int64_t multiprocessors;
  int64_t l2_bytes;
};

// What a block has in flight, and how many blocks of a kernel a multiprocessor holds.
struct Footprint {
  int64_t blocks_per_multiprocessor;
  int64_t norm_item_bytes;        // weights and gradients of a tile
  int64_t momentum_buffer_bytes;  // of a tile

  int64_t tile_bytes() const { return norm_item_bytes + momentum_buffer_bytes; }
};

// As many blocks as fit, unless their tiles would take more than a quarter of the L2. Two a multiprocessor
// are the least that keeps the memory busy.
inline int64_t resident_blocks(const Footprint& kernel, const DeviceSize& device) {
  const int64_t in_l2 = device.l2_bytes / 4 / (device.multiprocessors * kernel.tile_bytes());
  return device.multiprocessors * std::clamp<int64_t>(in_l2, 2, kernel.blocks_per_multiprocessor);
}

// Sets how far norms run ahead, and which tensors are updated from their end.
//
// The plan counts on half of the L2. A100 and H100 have an L2 of two parts, which may both keep what all
// multiprocessors read: full rates were published for some 70 % of its size. Of plans for all of it, for two
// thirds and for half, the last has the least worst case where 100, 80, 67 or 50 % turn out to hold data
// (docs/performance.md).
inline void set_window(Order& order, const Footprint& kernel, const DeviceSize& device, Pass pass) {
  const int64_t usable = device.l2_bytes / 2;
  // The first tiles of a larger tensor have left L2 when its norms end. Its last tiles are still there. The
  // same goes for every tensor of an update: the launch before it took the norms, from the first tile to the
  // last.
  order.forward_tiles = pass == Pass::update ? 0 : static_cast<uint32_t>(usable / kernel.tile_bytes());

  // Two fifths of that are for what norm items have read and update items will read again. The rest is for
  // the updates' own traffic.
  const int64_t window = usable / 5 * 2 / kernel.norm_item_bytes;
  // A block draws its next item while it works on one, so a norm item may lie a turn of all blocks in a
  // block's hand. At a distance of one and a half turns few updates have to wait; at less than half a turn
  // most do.
  const int64_t resident = resident_blocks(kernel, device);
  order.window = static_cast<uint32_t>(window);
  order.min_distance = static_cast<uint32_t>(resident / 2);
  order.max_distance = static_cast<uint32_t>(std::clamp(window, resident / 2, resident / 2 * 3));
}

}  // namespace fused_lars
