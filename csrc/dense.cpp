#include "dense.h"

#include <utility>

#include <ATen/ops/empty_strided.h>

namespace fused_lars {
namespace {

bool is_dense(const at::Tensor& tensor) { return tensor.is_non_overlapping_and_dense(); }

// Whether two tensors of one shape have their elements in the same order in memory. The stride of a dimension
// of size 1 does not matter, and no stride matters if there are no elements.
bool same_layout(const at::Tensor& a, const at::Tensor& b) {
  if (a.strides() == b.strides() || a.numel() == 0) return true;
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) != 1 && a.stride(d) != b.stride(d)) return false;
  }
  return true;
}

// Returns `tensor` if it has the layout of `like`, which is dense, or else a copy that has it.
at::Tensor as_layout(const at::Tensor& tensor, const at::Tensor& like) {
  if (same_layout(tensor, like) && is_dense(tensor)) return tensor;
  auto copy = at::empty_strided(like.sizes(), like.strides(), tensor.options());
  copy.copy_(tensor);
  return copy;
}

at::Tensor dense(const at::Tensor& tensor) { return is_dense(tensor) ? tensor : tensor.contiguous(); }

}  // namespace

void run_dense(void (*backend)(const Step&), Step& step) {
  std::vector<std::pair<at::Tensor, at::Tensor>> copy_back;  // (original, dense copy)
  for (auto& tensor : step.tensors) {
    const auto replace = [&](at::Tensor& original, at::Tensor replacement, bool written) {
      if (replacement.is_same(original)) return;
      if (written) copy_back.emplace_back(original, replacement);
      original = std::move(replacement);
    };
    // The blocks of an int8 buffer are runs of its memory, so the other tensors take its layout.
    const bool has_blocks = tensor.momentum_scale.defined();
    replace(tensor.param, has_blocks ? as_layout(tensor.param, tensor.momentum_buffer) : dense(tensor.param),
            true);
    replace(tensor.grad, as_layout(tensor.grad, tensor.param), false);
    if (tensor.momentum_buffer.defined()) {
      replace(tensor.momentum_buffer, as_layout(tensor.momentum_buffer, tensor.param), true);
    }
    if (tensor.master_param.defined()) {
      replace(tensor.master_param, as_layout(tensor.master_param, tensor.param), true);
    }
  }
  backend(step);
  for (auto& [original, copy] : copy_back) original.copy_(copy);
}

at::Tensor run_dense(NormKernel kernel, NormCall& call) {
  for (size_t i = 0; i < call.params.size(); ++i) {
    auto &param = call.params[i], &grad = call.grads[i];
    param = dense(param);
    grad = call.groups[call.group_of[i]].decayed_norm ? as_layout(grad, param) : dense(grad);
  }
  return kernel(call);
}

}  // namespace fused_lars
