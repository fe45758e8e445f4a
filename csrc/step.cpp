#include "step.h"

namespace fused_lars {

at::ScalarType norm_dtype(at::Device device) { return device.is_mps() ? at::kFloat : at::kDouble; }

Element element(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kDouble:
      return Element::f64;
    case at::kHalf:
      return Element::f16;
    case at::kBFloat16:
      return Element::bf16;
    default:
      return Element::f32;
  }
}

void fold_host_lr(Step& step) {
  for (size_t group = 0; group < step.lr_tensors.size(); ++group) {
    auto& lr = step.lr_tensors[group];
    if (!lr.device().is_cpu()) continue;
    step.groups[group].lr = lr.item<double>();
    lr = at::Tensor();
  }
}

}  // namespace fused_lars
