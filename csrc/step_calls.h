#pragma once

// From parameters with their state to one op call for each device: what Lars and LARS share.

#include <ATen/core/Tensor.h>

#include <optional>
#include <utility>
#include <vector>

#include "fused_lars/hyperparameters.h"
#include "fused_lars/workspaces.h"

namespace fused_lars {

// Where a parameter stands: a write changes its version or, as set_data does, its address. Nothing where that
// is not known: a tensor of inference mode has no version. Writes through .data() show in neither.
using ParamMark = std::optional<std::pair<uint32_t, const void*>>;
ParamMark mark_of(const at::Tensor& param);

// What one parameter keeps between steps; undefined where its group keeps none.
struct ParamState {
  at::Tensor momentum_buffer, master_param, step;
  ParamMark mark;  // after the last step; not stored
};

// Makes what `group` keeps for `param` and `state` lacks. Returns whether there was anything to make. A
// master takes over what was written into its parameter since the mark.
bool complete(ParamState& state, const at::Tensor& param, const Hyperparameters& group);

class StepCalls {
 public:
  explicit StepCalls(const std::vector<Hyperparameters>& groups) : groups_(groups) {}

  // Groups come in order. `state` is complete.
  void add(size_t group, const at::Tensor& param, const at::Tensor& grad, const ParamState& state);

  // One op call for each device. Throws before anything has changed on any of them.
  void run(Workspaces& workspaces) const;

 private:
  struct Call {
    Call(at::Device device, size_t groups) : device(device), group_sizes(groups) {}

    at::Device device;
    std::vector<at::Tensor> params, grads, momentum_buffers, master_params, steps;
    std::vector<int64_t> group_sizes;
  };

  std::vector<Hyperparameters> groups_;
  std::vector<Call> calls_;
};

}  // namespace fused_lars
