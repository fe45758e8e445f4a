#pragma once

#include <ATen/core/Tensor.h>

#include <unordered_map>
#include <vector>

namespace fused_lars {

// The scratch memory of an optimizer's steps, for each CUDA device: `workspace` in ops.h. Steps use the last
// tensor of the list. A step may need more memory than that has; the op then replaces it. The tensors before
// it stay in the list, since a captured graph, or a step on another stream, may still use them.
using Workspaces = std::unordered_map<at::Device, std::vector<at::Tensor>>;

}  // namespace fused_lars
