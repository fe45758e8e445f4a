#pragma once

// What the CUDA step's kernel is launched with. All of it travels in the kernel's parameters, so a step
// copies nothing to the device and a captured graph holds its own copy.

#include <cstddef>
#include <cstdint>

#include "../csrc/element.h"
#include "fused_lars/hyperparameters.h"
#include "order.h"

namespace fused_lars {

// What the tensors of a group share.
struct GroupRow {
  Hyperparameters hyperparameters;
  const void* lr = nullptr;  // one element of lr_element on the device, in place of hyperparameters.lr
  Element lr_element = Element::f32;

  bool operator==(const GroupRow&) const = default;
};

struct TensorMemory {
  void* weight;  // the master where there is one
  const void* grad;
  void* momentum_buffer;  // null without momentum
};

struct TensorRow : TensorMemory {
  uint32_t index;      // in trust_ratios, layer_norms and squared_norms
  uint16_t group;      // its row
  uint16_t last_tile;  // elements in the last tile, which may be 0
};

// One number for the weights and one for the gradients of a tile or a tensor: sums of squares, or norms.
template <typename T>
struct alignas(2 * sizeof(T)) Sums {
  T weight, grad;
};

// Words that blocks share. All are zero before a launch and after it.
struct Workspace {
  uint32_t* tickets;       // handed out so far
  uint32_t* finished;      // blocks that have left
  uint64_t* ratios;        // for each tensor: the trust ratio once it is known, encoded by step_kernel.cuh
  uint32_t* norm_items;    // for each tensor: norm items that are done
  Sums<double>* partials;  // for each norm item, as norms.cuh encodes them
};

struct LaunchArguments {
  Order order;
  Workspace workspace;
  Pass pass;
  const float* grad_scale;  // null: 1
  const float* found_inf;   // null: 0
  double* squared_norms;    // written by Pass::norms, read by Pass::update, else null
  double* trust_ratios;     // may be null
  double* layer_norms;      // may be null
  bool masters_follow;      // they take over what was written into their parameters

  // Byte offsets in Parameters::table of what each tensor has.
  uint16_t tensor_rows;
  uint16_t item_counts;  // ItemCounts before each tensor, and of all after the last
  // Of pointers. 0: no tensor has one. Else those of some tensors may be null.
  uint16_t params_of_masters;
  uint16_t steps;
  uint16_t momentum_scales;
  uint16_t rng_states;
};

struct Parameters : LaunchArguments {
  // Kernel parameters may take 32,764 bytes (CUDA 12.1, compute capability 7.0).
  static constexpr size_t kTableBytes = 32760 - sizeof(LaunchArguments);
  alignas(8) unsigned char table[kTableBytes];  // group rows, then what the offsets say

  template <typename T>
  FUSED_LARS_INLINE const T& entry(uint32_t offset, uint32_t i) const {
    return reinterpret_cast<const T*>(table + offset)[i];
  }
  // Of a table of pointers. Null if the tensor has none.
  template <typename T>
  FUSED_LARS_INLINE T* pointer(uint32_t offset, uint32_t i) const {
    return offset == 0 ? nullptr : entry<T*>(offset, i);
  }
  FUSED_LARS_INLINE const GroupRow& group(uint32_t i) const { return entry<GroupRow>(0, i); }
  FUSED_LARS_INLINE const TensorRow& tensor(uint32_t i) const { return entry<TensorRow>(tensor_rows, i); }
  FUSED_LARS_INLINE const ItemCounts& items_before(uint32_t i) const {
    return entry<ItemCounts>(item_counts, i);
  }
};
static_assert(sizeof(Parameters) <= 32764);

}  // namespace fused_lars
