#pragma once

// What Lars and LARS share: they turn parameters and their state into one op call for each device.

#include <ATen/core/Tensor.h>

#include <optional>
#include <utility>
#include <vector>

#include "fused_lars/hyperparameters.h"
#include "fused_lars/ops.h"
#include "fused_lars/workspaces.h"

namespace fused_lars {

// Tells whether a parameter was written: a write changes its version or, like set_data, its address. A write
// through .data() changes neither. The mark is empty if it cannot be known: an inference tensor has no
// version.
using ParamMark = std::optional<std::pair<uint32_t, const void*>>;
ParamMark mark_of(const at::Tensor& param);

// What one parameter keeps between steps. A tensor that its group does not need is undefined.
struct ParamState {
  at::Tensor momentum_buffer, master_param, step, momentum_scale, rng_state;
  ParamMark mark;  // taken after the last step; not saved
};

// What decides how state is made, beside hyperparameters.
struct StateOptions {
  std::optional<at::ScalarType> momentum_dtype = {};  // empty: the parameter's, or fp32 with a master
  int64_t rng_key = 0;                                // of the parameter
};

// Makes the state that `group` needs for `param` and that `state` does not have yet. Returns whether it made
// any. If the parameter was written since the mark, or if that is not known, its master takes over what was
// written.
bool complete(ParamState& state, const at::Tensor& param, const Hyperparameters& group,
              const StateOptions& options = {});

class StepCalls {
 public:
  explicit StepCalls(const std::vector<Hyperparameters>& groups) : groups_(groups) {}

  // Adds a parameter. Groups come in order, and complete() has been called for `state`.
  void add(size_t group, const at::Tensor& param, const at::Tensor& grad, const ParamState& state);

  // Makes one op call for each device. If it throws, nothing has changed on any device.
  void run(Workspaces& workspaces) const;

 private:
  struct Call {
    Call(at::Device device, size_t groups) : device(device), group_sizes(groups) {}

    at::Device device;
    StepLists lists() const {
      return {params, grads,           momentum_buffers, master_params,
              steps,  momentum_scales, rng_states,       group_sizes};
    }

    std::vector<at::Tensor> params, grads, momentum_buffers, master_params, steps, momentum_scales,
        rng_states;
    std::vector<int64_t> group_sizes;
  };

  std::vector<Hyperparameters> groups_;
  std::vector<Call> calls_;
};

}  // namespace fused_lars
