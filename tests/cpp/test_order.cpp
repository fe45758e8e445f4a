// The order in which the blocks of the CUDA step take their work, run through on the host.

#include <algorithm>
#include <cstdint>
#include <random>
#include <tuple>
#include <vector>

#include <gtest/gtest.h>

#include "../../kernels/order.h"

namespace fused_lars {
namespace {

// Norm and update items of each tensor.
using Tensors = std::vector<ItemCounts>;

class Walk {
 public:
  Walk(const Tensors& tensors, uint32_t distance, uint32_t forward_tiles, uint32_t window = 1u << 30)
      : tensors_(tensors) {
    ItemCounts sum = {0, 0};
    for (const auto& tensor : tensors) {
      before_.push_back(sum);
      sum = {sum.norms + tensor.norms, sum.updates + tensor.updates};
    }
    before_.push_back(sum);
    order_ = {sum, static_cast<uint32_t>(tensors.size()), window, distance / 6, distance, forward_tiles};
    std::mt19937 random(1);
    for (uint32_t ticket = 0; ticket < ticket_count(order_); ++ticket) {
      items_.push_back(work_item(order_, ticket, [&](uint32_t i) { return before_[i]; }));
      // The same from any item before it.
      const size_t from = random() % items_.size();
      const auto found = work_item(order_, ticket, [&](uint32_t i) { return before_[i]; }, items_[from]);
      EXPECT_EQ(
          std::tie(found.tensor, found.tile, found.is_update, found.turn),
          std::tie(items_.back().tensor, items_.back().tile, items_.back().is_update, items_.back().turn));
    }
  }

  const std::vector<WorkItem>& items() const { return items_; }

  void check() const {
    std::vector<std::vector<uint32_t>> norms(tensors_.size()), updates(tensors_.size());
    uint32_t norms_out = 0;
    for (const auto& item : items_) {
      ASSERT_LT(item.tensor, tensors_.size());
      if (!item.is_update) {
        norms[item.tensor].push_back(item.tile);
        ++norms_out;
        continue;
      }
      updates[item.tensor].push_back(item.tile);
      // All norms of the tensor, or the block would wait for work that nobody may have taken.
      EXPECT_EQ(norms[item.tensor].size(), tensors_[item.tensor].norms);
      // Ahead by the distance, and by no more.
      const uint32_t own = before_[item.tensor + 1].norms;
      const uint32_t distance = distance_after(order_, tensors_[item.tensor].norms);
      EXPECT_EQ(norms_out, std::min(own + distance, order_.items.norms));
    }
    for (size_t i = 0; i < tensors_.size(); ++i) {
      std::vector<uint32_t> tiles(tensors_[i].norms);
      for (uint32_t tile = 0; tile < tiles.size(); ++tile) tiles[tile] = tile;
      EXPECT_EQ(norms[i], tiles);
      tiles.resize(tensors_[i].updates);
      for (uint32_t tile = 0; tile < tiles.size(); ++tile) tiles[tile] = tile;
      if (tiles.size() > order_.forward_tiles) std::reverse(tiles.begin(), tiles.end());
      EXPECT_EQ(updates[i], tiles);
    }
  }

 private:
  const Tensors& tensors_;
  std::vector<ItemCounts> before_;
  Order order_;
  std::vector<WorkItem> items_;
};

constexpr uint32_t kForward = 1u << 30;

TEST(Order, NormsOfOneTensorThenItsUpdates) {
  const Tensors tensors = {{3, 3}};
  for (const uint32_t distance : {0u, 1u, 100u}) Walk(tensors, distance, kForward).check();
}

TEST(Order, NormsRunAheadByTheDistance) {
  const Tensors tensors = {{2, 2}, {2, 2}, {2, 2}};
  const Walk walk(tensors, 1, kForward);
  walk.check();
  std::vector<int> order;  // norm items as the tensor's number, update items as what is below 0
  for (const auto& item : walk.items()) {
    const int tensor = static_cast<int>(item.tensor);
    order.push_back(item.is_update ? ~tensor : tensor);
  }
  EXPECT_EQ(order, (std::vector<int>{0, 0, 1, ~0, ~0, 1, 2, ~1, ~1, 2, ~2, ~2}));
}

TEST(Order, TensorsWithoutNormItems) {
  for (const auto& tensors :
       {Tensors{{0, 1}, {4, 4}, {0, 5}, {0, 1}}, Tensors{{4, 4}, {0, 1}}, Tensors{{0, 7}}}) {
    for (const uint32_t distance : {0u, 1u, 3u, 100u}) Walk(tensors, distance, kForward).check();
  }
}

TEST(Order, OnlyNorms) {
  const Tensors tensors = {{1, 0}, {3, 0}, {1, 0}};
  for (const uint32_t distance : {0u, 2u, 100u}) Walk(tensors, distance, kForward).check();
}

TEST(Order, LargeTensorsAreUpdatedFromTheirEnd) {
  const Tensors tensors = {{9, 9}, {3, 3}, {0, 8}};
  Walk(tensors, 2, 3).check();
  Walk(tensors, 2, 0).check();
}

TEST(Order, ALargeTensorHasAShorterDistance) {
  const Tensors tensors = {{2, 2}, {40, 40}, {2, 2}, {400, 400}, {7, 7}, {0, 1}, {90, 90}};
  Walk(tensors, 12, kForward, 30).check();
  const Order order = {{0, 0}, 1, 30, 2, 12, kForward};
  EXPECT_EQ(distance_after(order, 2), 12u);
  EXPECT_EQ(distance_after(order, 40), 10u);
  EXPECT_EQ(distance_after(order, 400), 2u);
}

TEST(Order, ListsOfManySizes) {
  std::mt19937 random(0);
  for (int run = 0; run < 200; ++run) {
    Tensors tensors(1 + random() % 40);
    for (auto& tensor : tensors) {
      const uint32_t tiles = 1 + (random() % 4 == 0 ? random() % 60 : random() % 3);
      tensor = {random() % 3 == 0 ? 0 : tiles, tiles};
    }
    const uint32_t distance = random() % 50;
    Walk(tensors, distance, random() % 2 ? kForward : random() % 30, distance + random() % 50).check();
  }
}

}  // namespace
}  // namespace fused_lars
