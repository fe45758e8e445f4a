// How much of a device a launch of the CUDA step takes, by the sizes of real devices.

#include <algorithm>
#include <deque>
#include <random>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "../../kernels/plan.h"

namespace fused_lars {
namespace {

constexpr int64_t kKiB = 1 << 10;
constexpr DeviceSize kH100 = {132, 228 * kKiB, kKiB}, kA100 = {108, 164 * kKiB, kKiB},
                     kL4 = {58, 100 * kKiB, kKiB}, kT4 = {40, 64 * kKiB, 0};
constexpr Footprint kFp32 = {2, 800, 28 * kKiB}, kFp64 = {2, 1024, 28 * kKiB}, kMasters = {2, 800, 21 * kKiB};

TEST(Plan, AsManyStagesAsSharedMemoryHasRoomFor) {
  EXPECT_EQ(stages_of_block(kFp32, kH100), 4);
  EXPECT_EQ(stages_of_block(kFp64, kH100), 4);
  EXPECT_EQ(stages_of_block(kFp32, kA100), 2);
  EXPECT_EQ(stages_of_block(kMasters, kA100), 3);
  EXPECT_EQ(stages_of_block(kFp32, kL4), 1);
  EXPECT_EQ(stages_of_block(kFp32, kT4), 1);
  for (const auto& device : {kH100, kA100, kL4, kT4}) {
    for (const auto& kernel : {kFp32, kFp64, kMasters}) {
      const int64_t block = kernel.shared_bytes + stages_of_block(kernel, device) * kernel.stage_bytes;
      EXPECT_LE(2 * (block + device.reserved_shared_bytes), device.shared_bytes);
    }
  }
}

TEST(Plan, NoStageWhereNoneFits) {
  EXPECT_EQ(stages_of_block(kFp32, {132, 48 * kKiB, kKiB}), 0);
  EXPECT_EQ(stages_of_block(kFp32, {1, 0, 0}), 0);
  EXPECT_EQ(most_kept_tiles(kFp32, kH100, 0), 0);
}

TEST(Plan, ATensorKeepsAtMostSevenEighthsOfTheStages) {
  EXPECT_EQ(most_kept_tiles(kFp32, kH100, 4), 132 * 2 * 4 / 8 * 7);
  const auto most = static_cast<uint32_t>(most_kept_tiles(kFp32, kH100, 4));
  const auto updates = [&](uint32_t tiles) { return items_of_step(tiles, most).updates; };
  EXPECT_EQ(updates(2), 0u);
  EXPECT_EQ(updates(most), 0u);
  EXPECT_EQ(updates(most + 1), 1u);
  EXPECT_EQ(updates(10 * most), 9 * most);
  EXPECT_EQ(items_of_step(10 * most, most).norms, 10 * most);
}

TEST(Plan, ATensorOfOneTileTakesItsNormsInItsUpdate) {
  EXPECT_EQ(items_of_step(1, 100).norms, 0u);
  EXPECT_EQ(items_of_step(1, 100).updates, 1u);
}

// Blocks that work as the dispatcher does: they draw a ticket as soon as there is room for it, and count
// norms a move later. In every round one block, drawn by chance, does what it can. Returns whether all of
// them end.
bool all_blocks_end(const std::vector<ItemCounts>& tensors, int64_t most_blocks, int64_t stages,
                    uint32_t seed) {
  std::vector<ItemCounts> before = {{0, 0}};
  for (const auto& tensor : tensors) {
    before.push_back({before.back().norms + tensor.norms, before.back().updates + tensor.updates});
  }
  const Order order = {before.back(), static_cast<uint32_t>(tensors.size()), static_cast<uint32_t>(stages),
                       false};
  std::vector<uint32_t> norms_left;
  for (const auto& tensor : tensors) norms_left.push_back(tensor.norms);
  uint32_t tickets = 0;
  struct Block {
    std::deque<uint32_t> kept;     // tensors
    std::vector<uint32_t> counts;  // tensors, of norms that were taken and are not counted yet
    bool holds_ticket = false;
    uint32_t ticket = 0;
    bool ended = false;
  };
  const auto draw = [&](Block& block) {
    if (block.holds_ticket || (stages > 0 && static_cast<int64_t>(block.kept.size()) == stages)) return;
    block.holds_ticket = true;
    block.ticket = tickets++;
  };
  const auto move = [&](Block& block) {
    if (block.ended) return false;
    const std::vector<uint32_t> counts = std::exchange(block.counts, {});
    const bool has_item = block.holds_ticket && block.ticket < ticket_count(order.items);
    const auto item = has_item ? work_item(order, block.ticket, [&](uint32_t i) { return before[i]; })
                               : WorkItem{0, 0, true};
    bool moves = true;
    if (has_item && !item.is_update) {
      if (item.tile >= tensors[item.tensor].updates) block.kept.push_back(item.tensor);
      block.counts.push_back(item.tensor);
      block.holds_ticket = false;
    } else if (!block.kept.empty()) {
      moves = norms_left[block.kept.front()] == 0;
      if (moves) block.kept.pop_front();
    } else if (has_item) {
      moves = norms_left[item.tensor] == 0;
      if (moves) block.holds_ticket = false;
    } else {
      block.ended = true;
    }
    for (const uint32_t tensor : counts) --norms_left[tensor];
    if (moves) draw(block);
    return moves || !counts.empty();
  };
  std::vector<Block> blocks(std::min<int64_t>(most_blocks, ticket_count(order.items)));
  std::mt19937 random(seed);
  for (auto& block : blocks) draw(block);
  for (;;) {
    // A few moves of one block, then a look at whether any block can move.
    Block& one = blocks[random() % blocks.size()];
    for (uint32_t moves = random() % 8; moves > 0 && move(one); --moves) continue;
    if (std::none_of(blocks.begin(), blocks.end(), move)) break;
  }
  return std::all_of(blocks.begin(), blocks.end(), [](const Block& block) { return block.ended; });
}

TEST(Plan, BlocksNeverWaitForEachOther) {
  std::mt19937 random(0);
  for (int run = 0; run < 300; ++run) {
    const DeviceSize device = {static_cast<int64_t>(1 + random() % 3), kH100.shared_bytes,
                               kH100.reserved_shared_bytes};
    const int64_t stages = random() % (kMostStages + 1);
    const auto most = static_cast<uint32_t>(most_kept_tiles(kFp32, device, stages));
    std::vector<ItemCounts> tensors(1 + random() % 20);
    for (auto& tensor : tensors) {
      const uint32_t tiles = 1 + random() % (random() % 4 == 0 ? 60 : 4);
      tensor = random() % 3 == 0 ? ItemCounts{0, tiles} : items_of_step(tiles, most);
    }
    EXPECT_TRUE(all_blocks_end(tensors, resident_blocks(kFp32, device), stages, run)) << run;
  }
}

// What a tensor may keep is not a matter of taste.
TEST(Plan, BlocksWouldWaitForEachOtherIfATensorKeptMoreThanThereIsRoomFor) {
  EXPECT_FALSE(all_blocks_end({{9, 0}}, /*most_blocks=*/2, /*stages=*/4, 0));
}

}  // namespace
}  // namespace fused_lars
