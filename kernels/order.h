#pragma once

// The order in which the blocks of the CUDA step take their work.
//
// Tensors are cut into tiles. A tensor's update needs the norms of the whole tensor, so each tile is visited
// twice. Blocks draw tickets from one counter, and ticket k stands for the k-th item of
//
//   norm items of tensor 0, update items of tensor 0, norm items of tensor 1, update items of tensor 1, ...
//
// Most tiles have no update item. The block that takes a tile's norms keeps what it has read in shared
// memory, and updates the tile itself once the tensor's norms are complete. Meanwhile it draws further
// tickets, as long as it has room. Only of a tensor that would fill the device the first tiles are not kept.
// They have update items, which read weights and gradients again.
//
// There is no deadlock. Norm items never wait. A block holds a ticket only if it has room for its tile, and
// a tensor keeps fewer tiles than all blocks have room for. So the first tensor that is not complete gets its
// norms: what is kept of the tensors before it needs no other work and makes room. This needs all blocks to
// run at the same time, which a cooperative launch ensures. Where nothing is kept, that is not needed: then
// an item waits only for norm items with lower tickets.
//
// A tensor has no norm items if its norms are not needed, or if its only update item takes them. A launch for
// norms alone has no update items and keeps nothing, and the launch for the updates has no norm items.

#include <cstdint>

#include "../csrc/rule.h"

namespace fused_lars {

// What a launch is for. A sharded step is two launches, since ranks add up their norms before the updates.
enum class Pass : uint32_t { step, norms, update };

// How many items the tensors before one have: where its own begin.
struct ItemCounts {
  uint32_t norms;
  uint32_t updates;
};

struct WorkItem {
  uint32_t tensor;
  uint32_t tile;
  bool is_update;
};

struct Order {
  ItemCounts items;  // of all tensors
  uint32_t tensors;  // at least 1
  uint32_t stages;   // tiles that a block can keep
  // The launch before took the norms, from the first tile to the last, and L2 still holds the last ones.
  bool updates_from_the_end;
};

FUSED_LARS_INLINE uint32_t ticket_count(const ItemCounts& items) { return items.norms + items.updates; }

// The largest i < count with begin(i) <= value, for a rising `begin`; `low` where there is none. It must not
// be less than `low`, and is found fastest where it is little more: the steps from there double.
template <typename Begin>
FUSED_LARS_INLINE uint32_t last_at_or_below(uint32_t count, uint32_t value, const Begin& begin,
                                            uint32_t low) {
  uint32_t step = 1;
  for (; low + step < count && begin(low + step) <= value; step *= 2) low += step;
  for (uint32_t high = low + step < count ? low + step : count; high - low > 1;) {
    const uint32_t middle = low + (high - low) / 2;
    if (begin(middle) <= value) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// The item of a ticket below ticket_count(order.items). before(i) are the ItemCounts before tensor i, for i
// from 0 to order.tensors. The search starts from `from`, the tensor of any lower ticket.
template <typename Before>
FUSED_LARS_INLINE WorkItem work_item(const Order& order, uint32_t ticket, const Before& before,
                                     uint32_t from = 0) {
  const auto begin = [&](uint32_t i) { return ticket_count(before(i)); };
  const uint32_t tensor = last_at_or_below(order.tensors, ticket, begin, from);
  const uint32_t norms = before(tensor + 1).norms - before(tensor).norms;
  const uint32_t updates = before(tensor + 1).updates - before(tensor).updates;
  const uint32_t item = ticket - begin(tensor);
  if (item < norms) return {tensor, item, false};
  // Of tiles that are read again, L2 is most likely to hold those that were read last.
  const bool from_the_end = norms != 0 || order.updates_from_the_end;
  return {tensor, from_the_end ? updates - 1 - (item - norms) : item, true};
}

}  // namespace fused_lars
