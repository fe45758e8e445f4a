// The order in which the blocks of the CUDA step take their work, run through on the host.

#include <algorithm>
#include <cstdint>
#include <numeric>
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
  explicit Walk(const Tensors& tensors, bool updates_from_the_end = false) : tensors_(tensors) {
    std::vector<ItemCounts> before = {{0, 0}};
    for (const auto& tensor : tensors) {
      before.push_back({before.back().norms + tensor.norms, before.back().updates + tensor.updates});
    }
    const auto count = static_cast<uint32_t>(tensors.size());
    const Order order = {before.back(), count, /*stages=*/0, updates_from_the_end};
    std::mt19937 random(1);
    for (uint32_t ticket = 0; ticket < ticket_count(order.items); ++ticket) {
      items_.push_back(work_item(order, ticket, [&](uint32_t i) { return before[i]; }));
      // The same from the tensor of any item before it.
      const uint32_t from = items_[random() % items_.size()].tensor;
      const auto found = work_item(order, ticket, [&](uint32_t i) { return before[i]; }, from);
      EXPECT_EQ(std::tie(found.tensor, found.tile, found.is_update),
                std::tie(items_.back().tensor, items_.back().tile, items_.back().is_update));
    }
  }

  // The items are those of one tensor after the other: its norms from the first tile on, then its updates.
  void check(bool updates_from_the_end = false) const {
    auto item = items_.begin();
    for (uint32_t tensor = 0; tensor < tensors_.size(); ++tensor) {
      const auto& count = tensors_[tensor];
      std::vector<uint32_t> updates(count.updates);
      std::iota(updates.begin(), updates.end(), 0);
      if (count.norms != 0 || updates_from_the_end) std::reverse(updates.begin(), updates.end());
      for (uint32_t tile = 0; tile < count.norms; ++tile, ++item) expect(*item, tensor, tile, false);
      for (const uint32_t tile : updates) expect(*item++, tensor, tile, true);
    }
    EXPECT_EQ(item, items_.end());
  }

 private:
  static void expect(const WorkItem& item, uint32_t tensor, uint32_t tile, bool is_update) {
    EXPECT_EQ(std::tie(item.tensor, item.tile, item.is_update), std::tie(tensor, tile, is_update));
  }

  const Tensors& tensors_;
  std::vector<WorkItem> items_;
};

TEST(Order, KeptTilesHaveNoUpdateItems) {
  const Tensors tensors = {{3, 0}, {2, 0}};
  Walk(tensors).check();
}

TEST(Order, UpdatesOfTilesThatAreNotKeptFollowTheNormsFromTheEnd) {
  const Tensors tensors = {{9, 4}, {3, 3}, {5, 0}};
  Walk(tensors).check();
}

TEST(Order, TensorsWithoutNormItems) {
  for (const auto& tensors :
       {Tensors{{0, 1}, {4, 0}, {0, 5}, {0, 1}}, Tensors{{4, 1}, {0, 1}}, Tensors{{0, 7}}}) {
    Walk(tensors).check();
  }
}

TEST(Order, OnlyNorms) {
  const Tensors tensors = {{1, 0}, {3, 0}, {1, 0}};
  Walk(tensors).check();
}

TEST(Order, OnlyUpdates) {
  const Tensors tensors = {{0, 1}, {0, 3}, {0, 40}};
  for (const bool from_the_end : {false, true}) Walk(tensors, from_the_end).check(from_the_end);
}

TEST(Order, ListsOfManySizes) {
  std::mt19937 random(0);
  for (int run = 0; run < 200; ++run) {
    Tensors tensors(1 + random() % 40);
    for (auto& tensor : tensors) {
      const uint32_t tiles = 1 + (random() % 4 == 0 ? random() % 60 : random() % 3);
      const auto updates = static_cast<uint32_t>(random() % (tiles + 1));
      tensor = random() % 3 == 0 ? ItemCounts{0, tiles} : ItemCounts{tiles, updates};
    }
    Walk(tensors).check();
  }
}

}  // namespace
}  // namespace fused_lars
