#include "step.h"

#include <ATen/ops/where.h>

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
    case at::kChar:
      return Element::i8;
    default:
      return Element::f32;
  }
}

void take_over(const at::Tensor& param, const at::Tensor& master, const at::Tensor& skip) {
  const auto bits = [](const at::Tensor& tensor) { return tensor.view(at::kShort); };
  auto written = bits(param.detach()).ne(bits(master.detach().to(param.scalar_type())));
  if (skip.defined()) written = written.logical_and(skip.logical_not());
  master.copy_(at::where(written, param.detach(), master));
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
