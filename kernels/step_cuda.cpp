// The CUDA backend that the ops call. It sorts tensors into buckets, sees to the device, the stream and the
// workspace, and launches the kernel.

#include <algorithm>
#include <exception>

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAStream.h>

#include "../csrc/step.h"
#include "launch.h"

namespace fused_lars {
namespace {

template <typename T>
T* data_or_null(const at::Tensor& tensor) {
  return tensor.defined() ? static_cast<T*>(tensor.data_ptr()) : nullptr;
}

// The tensors of the bucket with the given types. Makes the bucket if there is none.
std::vector<LaunchTensor>& bucket_of(std::vector<Bucket>& buckets, const KernelTypes& types) {
  for (auto& bucket : buckets) {
    if (bucket.types == types) return bucket.tensors;
  }
  buckets.push_back({types, {}});
  return buckets.back().tensors;
}

// Makes a device the current one during its lifetime. c10::cuda::CUDAGuard would end the process after a
// failure of the device, up to torch 2.11: its destructor is noexcept, and what it calls throws.
class CurrentDevice {
 public:
  explicit CurrentDevice(c10::Device device) : previous_(c10::cuda::current_device()) {
    c10::cuda::set_device(device.index());
  }
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;
  ~CurrentDevice() {
    try {
      C10_CUDA_IGNORE_ERROR(c10::cuda::MaybeSetDevice(previous_));
    } catch (const std::exception&) {  // the next call to the device reports the failure too
    }
  }

 private:
  c10::DeviceIndex previous_;
};

// Launches the buckets on the device of `like`. If the caller gave no workspace it makes a temporary one.
void launch_all(const std::vector<Bucket>& buckets, const std::vector<GroupRow>& groups,
                LaunchOptions options, at::Tensor workspace, const at::Tensor& like) {
  const CurrentDevice current(like.device());
  const auto attribute = [&](cudaDeviceAttr which) {
    int value = 0;
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, like.device().index()));
    return value;
  };
  options.device = {attribute(cudaDevAttrMultiProcessorCount),
                    attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor),
                    attribute(cudaDevAttrReservedSharedMemoryPerBlock)};

  int64_t words = 0;
  for (const auto& bucket : buckets) words = std::max(words, workspace_words(bucket, groups, options));
  if (!workspace.defined() || workspace.numel() < words) {
    const bool capturing =
        c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None;
    // During a capture, memory is not zeroed until the graph is replayed, so a step outside of the graph
    // cannot use it.
    const bool keep = workspace.defined() && !capturing;
    const auto larger =
        at::zeros({keep ? std::max(words, 2 * workspace.numel()) : words}, like.options().dtype(at::kInt));
    // Not resize_: it would free memory that a captured graph or another stream may still use.
    workspace = keep ? workspace.set_(larger) : larger;
  }
  const auto stream = c10::cuda::getCurrentCUDAStream();
  for (const auto& bucket : buckets) {
    C10_CUDA_CHECK(launch(bucket, groups, options, workspace.data_ptr(), stream));
  }
}

}  // namespace

void step_cuda(const Step& step) {
  // Equal groups share a row, so that many groups fit in one launch. Only the last rows are searched: an
  // equal one is most likely there.
  constexpr size_t kLookBack = 16;
  std::vector<GroupRow> rows;
  std::vector<uint32_t> row_of_group;
  std::vector<at::Tensor> converted;  // kept until the launches are in the stream
  for (size_t group = 0; group < step.groups.size(); ++group) {
    GroupRow row{.hyperparameters = step.groups[group]};
    if (!step.lr_tensors.empty() && step.lr_tensors[group].defined()) {
      auto lr = step.lr_tensors[group];
      if (element(lr) == Element::f32 && lr.scalar_type() != at::kFloat) {
        converted.push_back(lr = lr.to(at::kFloat));  // an 8-bit type
      }
      row.lr = lr.data_ptr();
      row.lr_element = element(lr);
    }
    auto known = std::find(rows.end() - std::min(rows.size(), kLookBack), rows.end(), row);
    if (known == rows.end()) known = rows.insert(rows.end(), row);
    row_of_group.push_back(static_cast<uint32_t>(known - rows.begin()));
  }

  std::vector<Bucket> buckets;
  const auto add = [&](size_t i) {
    const auto& tensor = step.tensors[i];
    const bool master = tensor.master_param.defined();
    const auto momentum_type = tensor.momentum_buffer.defined() ? tensor.momentum_buffer : tensor.weight();
    bucket_of(buckets, {element(tensor.param), element(tensor.grad), element(momentum_type), master})
        .push_back({{.weight = tensor.weight().data_ptr(),
                     .grad = tensor.grad.const_data_ptr(),
                     .momentum_buffer = data_or_null<void>(tensor.momentum_buffer)},
                    /*param=*/tensor.param.data_ptr(),
                    /*step=*/data_or_null<float>(tensor.step),
                    /*momentum_scale=*/data_or_null<float>(tensor.momentum_scale),
                    /*rng_state=*/data_or_null<int64_t>(tensor.rng_state),
                    tensor.param.numel(),
                    static_cast<uint32_t>(i),
                    row_of_group[tensor.group]});
  };
  if (step.squared_norms.defined()) {
    // An earlier launch took the norms, in order. L2 still holds what it read last, so that comes first.
    for (size_t i = step.tensors.size(); i-- > 0;) add(i);
  } else {
    for (size_t i = 0; i < step.tensors.size(); ++i) add(i);
  }

  LaunchOptions options;
  options.pass = step.squared_norms.defined() ? Pass::update : Pass::step;
  options.grad_scale = data_or_null<const float>(step.grad_scale);
  options.found_inf = data_or_null<const float>(step.found_inf);
  options.squared_norms = data_or_null<double>(step.squared_norms);
  options.trust_ratios = data_or_null<double>(step.trust_ratios);
  options.layer_norms = data_or_null<double>(step.layer_norms);
  options.masters_follow = step.masters_follow;
  launch_all(buckets, rows, options, step.workspace, step.tensors[0].param);
}

at::Tensor squared_norms_cuda(const NormCall& call) {
  const auto count = static_cast<int64_t>(call.params.size());
  auto result = at::empty({count, 2}, call.params[0].options().dtype(at::kDouble));
  std::vector<GroupRow> rows;
  for (const auto& group : call.groups) rows.push_back({.hyperparameters = group});
  std::vector<Bucket> buckets;
  std::vector<at::Tensor> converted;
  for (int64_t i = 0; i < count; ++i) {
    auto param = call.params[i], grad = call.grads[i];
    KernelTypes types{element(param), element(grad), element(param), /*master=*/false};
    if (types.param == Element::f32 && (types.grad == Element::f16 || types.grad == Element::bf16)) {
      types = {types.grad, types.grad, Element::f32, /*master=*/true};
    } else if (types.grad != types.param && types.grad != Element::f32) {  // no step has this pair of types
      converted.push_back(param = param.to(at::kDouble));
      converted.push_back(grad = grad.to(at::kDouble));
      types = {Element::f64, Element::f64, Element::f64, /*master=*/false};
    }
    bucket_of(buckets, types)
        .push_back({{.weight = param.data_ptr(), .grad = grad.data_ptr(), .momentum_buffer = nullptr},
                    /*param=*/nullptr,
                    /*step=*/nullptr,
                    /*momentum_scale=*/nullptr,
                    /*rng_state=*/nullptr,
                    param.numel(),
                    static_cast<uint32_t>(i),
                    static_cast<uint32_t>(call.group_of[i])});
  }
  LaunchOptions options;
  options.pass = Pass::norms;
  options.grad_scale = data_or_null<const float>(call.grad_scale);
  options.squared_norms = result.data_ptr<double>();
  launch_all(buckets, rows, options, call.workspace, result);
  return result;
}

}  // namespace fused_lars
