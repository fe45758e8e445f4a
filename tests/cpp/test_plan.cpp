// How much of a device a launch of the CUDA step takes, by the sizes of real devices.

#include <gtest/gtest.h>

#include "../../kernels/plan.h"

namespace fused_lars {
namespace {

constexpr int64_t kMiB = 1 << 20;
constexpr DeviceSize kH100 = {132, 50 * kMiB}, kA100 = {108, 40 * kMiB}, kT4 = {40, 4 * kMiB};
constexpr Footprint kFp32 = {4, 16384, 8192}, kBf16 = {4, 16384, 8192 / 2};

Order window_of(const Footprint& kernel, const DeviceSize& device, Pass pass = Pass::step) {
  Order order = {};
  set_window(order, kernel, device, pass);
  return order;
}

TEST(Plan, TilesInFlightTakeAQuarterOfTheL2AtMost) {
  EXPECT_EQ(resident_blocks(kFp32, kH100), 4 * 132);
  EXPECT_EQ(resident_blocks(kFp32, kA100), 3 * 108);
  EXPECT_EQ(resident_blocks({3, 16384, 8192}, kH100), 3 * 132);
  for (const auto& device : {kH100, kA100}) {
    EXPECT_LE(resident_blocks(kFp32, device) * kFp32.tile_bytes(), device.l2_bytes / 4);
  }
}

TEST(Plan, TwoBlocksAMultiprocessorWhereTheL2IsSmall) {
  EXPECT_EQ(resident_blocks(kFp32, kT4), 2 * 40);
  EXPECT_EQ(resident_blocks(kFp32, {40, 0}), 2 * 40);
}

TEST(Plan, NormsRunAheadByOneAndAHalfTurnsWhereTheL2AllowsIt) {
  const Order order = window_of(kFp32, {132, 120 * kMiB});
  EXPECT_EQ(order.max_distance, 132u * 4 * 3 / 2);
  EXPECT_EQ(order.min_distance, 132u * 4 / 2);
  EXPECT_GE(order.window, order.max_distance);
}

TEST(Plan, WhatNormsHaveReadStaysWithinItsShareOfTheL2) {
  for (const auto& device : {kH100, kA100}) {
    const Order order = window_of(kFp32, device);
    EXPECT_LE(order.window * kFp32.norm_item_bytes, device.l2_bytes / 5);  // two fifths of half
    EXPECT_LE(order.max_distance, order.window);
    EXPECT_LE(order.min_distance, order.max_distance);
  }
}

TEST(Plan, ASmallL2LeavesTheLeastDistance) {
  const Order order = window_of(kFp32, kT4);
  EXPECT_EQ(order.min_distance, 40u);
  EXPECT_EQ(order.max_distance, 51u);  // the window: 4 MiB / 5 / 16 KiB
}

TEST(Plan, TensorsThatFitInTheL2AreUpdatedFromTheirBeginning) {
  EXPECT_EQ(window_of(kFp32, kH100).forward_tiles, 25 * kMiB / 24576);
  EXPECT_GT(window_of(kBf16, kH100).forward_tiles, window_of(kFp32, kH100).forward_tiles);
}

// The launch before it took the norms in order, so the end of any tensor was read last.
TEST(Plan, AnUpdateBeginsAtTheEndOfEveryTensor) {
  EXPECT_EQ(window_of(kFp32, kH100, Pass::update).forward_tiles, 0u);
}

}  // namespace
}  // namespace fused_lars
