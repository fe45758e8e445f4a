#pragma once

#include <ATen/core/Tensor.h>

#include <unordered_map>
#include <vector>

namespace fused_lars {

// An optimizer's scratch memory for each CUDA device: `workspace` in ops.h. A step uses the last tensor of
// the list. If the step needs more memory, the larger tensor is added to the list. The ones before it are
// kept, since a captured graph, or a step on another stream, may still use them.
using Workspaces = std::unordered_map<at::Device, std::vector<at::Tensor>>;

}  // namespace fused_lars
