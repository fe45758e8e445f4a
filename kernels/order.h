#pragma once

// The order in which the blocks of the CUDA step take their work.
//
// Tensors are cut into tiles. A tensor's update needs the norms of the whole tensor, so a tile is visited
// twice: a norm item reads its weights and gradients, and an update item reads them again, soon enough to
// find them in L2. Blocks draw tickets from one counter, and ticket k names the k-th item of
//
//   norm items of tensor 0 and of the `distance` norm items after it, update items of tensor 0,
//   norm items up to `distance` after tensor 1,                       update items of tensor 1, ...
//
// so norms run ahead by no more than the tensor in hand and `distance` items: enough that they are ready
// when their updates come, little enough that what they read has not left L2.
//
// No block ever waits in vain, however few of them are resident. A block works off its tickets in rising
// order, norm items never wait, and an update item waits only for norm items with lower tickets. So the
// block with the lowest unfinished ticket can always run.
//
// A tensor may have no norm items (its norms are given, not needed, or taken by its only update item), and
// a launch may have no update items.

#include <cstdint>

#include "../csrc/rule.h"

namespace fused_lars {

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
  ItemCounts items;        // of all tensors
  uint32_t tensors;        // at least 1
  uint32_t distance;       // in norm items
  uint32_t forward_tiles;  // a tensor of more tiles is updated from its end, where its norms were taken last
};

FUSED_LARS_INLINE uint32_t ticket_count(const Order& order) {
  return order.items.norms + order.items.updates;
}

// The largest i < count with begin(i) <= value, for a rising `begin`; 0 where there is none.
template <typename Begin>
FUSED_LARS_INLINE uint32_t last_at_or_below(uint32_t count, uint32_t value, const Begin& begin) {
  uint32_t low = 0;
  for (uint32_t high = count; high - low > 1;) {
    const uint32_t middle = low + (high - low) / 2;
    if (begin(middle) <= value) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// The item of a ticket below ticket_count(order). before(i) are the ItemCounts before tensor i, for i from 0
// to order.tensors.
template <typename Before>
FUSED_LARS_INLINE WorkItem work_item(const Order& order, uint32_t ticket, const Before& before) {
  // Norm items handed out before the items of tensor i's turn, but for the first one, before which are none.
  const auto norms_before_turn = [&](uint32_t i) {
    const uint32_t ahead = before(i).norms + order.distance;
    return ahead < order.items.norms ? ahead : order.items.norms;
  };
  const auto turn_begin = [&](uint32_t i) { return norms_before_turn(i) + before(i).updates; };

  const uint32_t turn = last_at_or_below(order.tensors, ticket, turn_begin);
  const uint32_t norm = ticket - before(turn).updates;
  const uint32_t norms_end = norms_before_turn(turn + 1);
  if (norm < norms_end) {
    const auto norms_begin = [&](uint32_t i) { return before(i).norms; };
    const uint32_t tensor = last_at_or_below(order.tensors, norm, norms_begin);
    return {tensor, norm - before(tensor).norms, false};
  }
  const uint32_t tiles = before(turn + 1).updates - before(turn).updates;
  const uint32_t tile = norm - norms_end;
  return {turn, tiles > order.forward_tiles ? tiles - 1 - tile : tile, true};
}

}  // namespace fused_lars
