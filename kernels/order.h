#pragma once

// The order in which the blocks of the CUDA step take their work.
//
// Tensors are cut into tiles. A tensor's update needs the norms of the whole tensor, so each tile is visited
// twice. A norm item reads its weights and gradients. An update item reads them again, soon enough to find
// them in L2. Blocks draw tickets from one counter, and ticket k stands for the k-th item of
//
//   norm items of tensor 0 and of the distance(0) norm items after it, update items of tensor 0,
//   norm items up to distance(1) after tensor 1,                       update items of tensor 1, ...
//
// Norms run ahead of updates by one tensor and its distance. That is far enough for most norms to be ready
// when their updates come, and near enough for what they read to be in L2 still. A large tensor fills L2 by
// itself, so its distance is shorter.
//
// There is no deadlock, however few blocks are resident. A block works off its tickets in rising order. Norm
// items never wait, and an update item waits only for norm items with lower tickets. So the block that has
// the lowest unfinished ticket can always run, and it has finished all tickets that it drew before.
//
// A tensor has no norm items if its norms are not needed, or if its only update item takes them. A launch for
// norms alone has no update items, and the launch for the updates has no norm items.

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
  uint32_t turn;  // the tensor in whose turn the item is handed out
};

struct Order {
  ItemCounts items;        // of all tensors
  uint32_t tensors;        // at least 1
  uint32_t window;         // norm items that L2 has room for, the updates between them included
  uint32_t min_distance;   // in norm items
  uint32_t max_distance;   // at most `window`, or min_distance
  uint32_t forward_tiles;  // a tensor of more tiles is updated from its end, where its norms were taken last
};

FUSED_LARS_INLINE uint32_t ticket_count(const Order& order) {
  return order.items.norms + order.items.updates;
}

// How many norm items are handed out after a tensor of so many before its updates are. From one tensor to the
// next it falls by no more than the next one's items, so the number that are out never falls.
FUSED_LARS_INLINE uint32_t distance_after(const Order& order, uint32_t norm_items) {
  const uint32_t taken = norm_items / 2;
  const uint32_t left = order.window > taken ? order.window - taken : 0;
  if (left < order.min_distance) return order.min_distance;
  return left < order.max_distance ? left : order.max_distance;
}

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

// The item of a ticket below ticket_count(order). before(i) are the ItemCounts before tensor i, for i from 0
// to order.tensors. The search starts from `previous`, the item of any lower ticket.
template <typename Before>
FUSED_LARS_INLINE WorkItem work_item(const Order& order, uint32_t ticket, const Before& before,
                                     const WorkItem& previous = {}) {
  // Norm items handed out before the items of tensor i's turn, i > 0. Before the first are none.
  const auto norms_before_turn = [&](uint32_t i) {
    const uint32_t norms = before(i).norms;
    const uint32_t ahead = norms + distance_after(order, norms - before(i - 1).norms);
    return ahead < order.items.norms ? ahead : order.items.norms;
  };
  const auto turn_begin = [&](uint32_t i) { return norms_before_turn(i) + before(i).updates; };

  const uint32_t turn = last_at_or_below(order.tensors, ticket, turn_begin, previous.turn);
  const uint32_t norm = ticket - before(turn).updates;
  const uint32_t norms_end = norms_before_turn(turn + 1);
  if (norm < norms_end) {
    const auto norms_begin = [&](uint32_t i) { return before(i).norms; };
    const uint32_t from = previous.tensor > turn ? previous.tensor : turn;
    const uint32_t tensor = last_at_or_below(order.tensors, norm, norms_begin, from);
    return {tensor, norm - before(tensor).norms, false, turn};
  }
  const uint32_t tiles = before(turn + 1).updates - before(turn).updates;
  const uint32_t tile = norm - norms_end;
  return {turn, tiles > order.forward_tiles ? tiles - 1 - tile : tile, true, turn};
}

}  // namespace fused_lars
