#include "launch.h"

#include <algorithm>
#include <utility>

namespace fused_lars {
namespace {

// Of the workspace.
constexpr int64_t kWords = 2 + 3;      // tickets, finished; for the alignment of the start
constexpr int64_t kTensorWords = 3;    // trust ratio (two), norm items that are done
constexpr int64_t kNormItemWords = 4;  // sums

// How a bucket's tensors are cut.
class Tiling {
 public:
  // Stages: tiles that a block keeps, 0 or more.
  Tiling(const Kernel& kernel, const std::vector<GroupRow>& groups, const LaunchOptions& options,
         int64_t stages)
      : kernel_(kernel),
        groups_(groups),
        options_(options),
        most_kept_(static_cast<uint32_t>(most_kept_tiles(kernel.footprint, options.device, stages))) {}

  // At least one, so that the trust ratio of an empty tensor is written too.
  uint32_t tiles(const LaunchTensor& tensor) const {
    return static_cast<uint32_t>(std::max<int64_t>(1, (tensor.numel + kernel_.tile - 1) / kernel_.tile));
  }
  ItemCounts items(const LaunchTensor& tensor) const {
    const uint32_t count = tiles(tensor);
    if (options_.pass == Pass::norms) return {count, 0};
    const bool needs_norms = options_.pass == Pass::step &&
                             (options_.layer_norms || groups_[tensor.group].hyperparameters.layer_adaptation);
    return needs_norms ? items_of_step(count, most_kept_) : ItemCounts{0, count};
  }
  uint16_t last_tile(const LaunchTensor& tensor) const {
    return static_cast<uint16_t>(tensor.numel - int64_t{tiles(tensor) - 1} * kernel_.tile);
  }

 private:
  const Kernel& kernel_;
  const std::vector<GroupRow>& groups_;
  const LaunchOptions& options_;
  const uint32_t most_kept_;
};

// Fills a launch's table.
class Packer {
 public:
  Packer(const Bucket& bucket, const std::vector<GroupRow>& groups, const Tiling& tiling)
      : bucket_(bucket), groups_(groups), tiling_(tiling) {
    for (const auto& tensor : bucket.tensors) {
      any_step_ |= tensor.step != nullptr;
      any_momentum_scale_ |= tensor.momentum_scale != nullptr;
      any_rng_state_ |= tensor.rng_state != nullptr;
    }
  }

  // With as many of the bucket's tensors, from `begin` on, as fit: p.order.tensors.
  void fill(Parameters& p, size_t begin) {
    rows_.clear();
    row_of_group_.assign(groups_.size(), kNoRow);
    const int tables = bucket_.types.master + any_step_ + any_momentum_scale_ + any_rng_state_;
    const size_t tensor_bytes = sizeof(TensorRow) + sizeof(ItemCounts) + tables * sizeof(void*);
    size_t bytes = sizeof(ItemCounts), count = 0;
    for (; begin + count < bucket_.tensors.size(); ++count) {
      const uint32_t group = bucket_.tensors[begin + count].group;
      const bool new_row = row_of_group_[group] == kNoRow;
      bytes += tensor_bytes + (new_row ? sizeof(GroupRow) : 0);
      if (bytes > Parameters::kTableBytes) break;
      if (!new_row) continue;
      row_of_group_[group] = static_cast<uint16_t>(rows_.size());
      rows_.push_back(groups_[group]);
    }

    size_t offset = 0;
    const auto section = [&](size_t entry_bytes, size_t entries) {
      return static_cast<uint16_t>(std::exchange(offset, offset + entry_bytes * entries));
    };
    section(sizeof(GroupRow), rows_.size());
    p.tensor_rows = section(sizeof(TensorRow), count);
    p.item_counts = section(sizeof(ItemCounts), count + 1);
    const auto table_of = [&](bool any) { return any ? section(sizeof(void*), count) : uint16_t{0}; };
    p.params_of_masters = table_of(bucket_.types.master);
    p.steps = table_of(any_step_);
    p.momentum_scales = table_of(any_momentum_scale_);
    p.rng_states = table_of(any_rng_state_);

    for (size_t i = 0; i < rows_.size(); ++i) write(p, 0, i, rows_[i]);
    ItemCounts before = {0, 0};
    for (size_t i = 0; i < count; ++i) {
      const LaunchTensor& tensor = bucket_.tensors[begin + i];
      write(p, p.tensor_rows, i,
            TensorRow{tensor, tensor.index, row_of_group_[tensor.group], tiling_.last_tile(tensor)});
      write(p, p.item_counts, i, before);
      if (bucket_.types.master) write(p, p.params_of_masters, i, tensor.param);
      if (any_step_) write(p, p.steps, i, tensor.step);
      if (any_momentum_scale_) write(p, p.momentum_scales, i, tensor.momentum_scale);
      if (any_rng_state_) write(p, p.rng_states, i, tensor.rng_state);
      const ItemCounts items = tiling_.items(tensor);
      before = {before.norms + items.norms, before.updates + items.updates};
    }
    write(p, p.item_counts, count, before);
    p.order.items = before;
    p.order.tensors = static_cast<uint32_t>(count);
  }

 private:
  static constexpr uint16_t kNoRow = 0xffff;

  template <typename T>
  static void write(Parameters& p, size_t offset, size_t i, const T& value) {
    *reinterpret_cast<T*>(p.table + offset + i * sizeof(T)) = value;
  }

  const Bucket& bucket_;
  const std::vector<GroupRow>& groups_;
  const Tiling& tiling_;
  bool any_step_ = false, any_momentum_scale_ = false, any_rng_state_ = false;
  std::vector<uint16_t> row_of_group_;
  std::vector<GroupRow> rows_;
};

// The sums first, which take the widest accesses.
Workspace lay_out(void* base, const Order& order) {
  const auto address = reinterpret_cast<uintptr_t>(base);
  auto* words = static_cast<uint32_t*>(base) + (-address) % sizeof(Sums<double>) / sizeof(uint32_t);
  Workspace workspace;
  workspace.partials = reinterpret_cast<Sums<double>*>(words);
  workspace.ratios = reinterpret_cast<uint64_t*>(words + kNormItemWords * order.items.norms);
  workspace.norm_items = reinterpret_cast<uint32_t*>(workspace.ratios + order.tensors);
  workspace.tickets = workspace.norm_items + order.tensors;
  workspace.finished = workspace.tickets + 1;
  return workspace;
}

// Launches the tensors from `begin` on, and moves it behind those of each launch that succeeds.
cudaError_t launch_with_stages(int64_t stages, size_t& begin, const Bucket& bucket,
                               const std::vector<GroupRow>& groups, const LaunchOptions& options,
                               void* workspace, cudaStream_t stream) {
  const Kernel& kernel = *find_kernel(bucket.types);
  const auto* function = reinterpret_cast<const void*>(kernel.function);
  const auto shared_bytes = static_cast<size_t>(stages * kernel.footprint.stage_bytes);
  if (stages > 0) {
    const auto error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                            static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  Parameters p;
  p.pass = options.pass;
  p.grad_scale = options.grad_scale;
  p.found_inf = options.found_inf;
  p.trust_ratios = options.trust_ratios;
  p.layer_norms = options.layer_norms;
  p.squared_norms = options.squared_norms;
  p.masters_follow = options.masters_follow;
  p.order.stages = static_cast<uint32_t>(stages);
  p.order.updates_from_the_end = options.pass == Pass::update;

  const auto resident = static_cast<uint32_t>(resident_blocks(kernel.footprint, options.device));
  const Tiling tiling(kernel, groups, options, stages);
  Packer packer(bucket, groups, tiling);
  while (begin < bucket.tensors.size()) {
    packer.fill(p, begin);
    p.workspace = lay_out(workspace, p.order);
    void* arguments[] = {&p};
    const dim3 grid(std::min(ticket_count(p.order.items), resident)), block(kernel.threads);
    const auto launch_kernel = stages > 0 ? cudaLaunchCooperativeKernel : cudaLaunchKernel;
    const auto error = launch_kernel(function, grid, block, arguments, shared_bytes, stream);
    if (error != cudaSuccess) return error;
    begin += p.order.tensors;
  }
  return cudaSuccess;
}

}  // namespace

int64_t workspace_words(const Bucket& bucket, const std::vector<GroupRow>& groups,
                        const LaunchOptions& options) {
  const Tiling tiling(*find_kernel(bucket.types), groups, options, /*stages=*/0);
  int64_t words = kWords + kTensorWords * static_cast<int64_t>(bucket.tensors.size());
  for (const auto& tensor : bucket.tensors) words += kNormItemWords * tiling.items(tensor).norms;
  return words;
}

cudaError_t launch(const Bucket& bucket, const std::vector<GroupRow>& groups, const LaunchOptions& options,
                   void* workspace, cudaStream_t stream) {
  // Only a whole step has tiles to keep.
  const int64_t stages =
      options.pass == Pass::step ? stages_of_block(find_kernel(bucket.types)->footprint, options.device) : 0;
  size_t begin = 0;
  const auto error = launch_with_stages(stages, begin, bucket, groups, options, workspace, stream);
  // The device does not hold as many blocks as its properties say, or never runs all of a launch at once.
  const bool does_not_fit = error == cudaErrorCooperativeLaunchTooLarge || error == cudaErrorNotSupported;
  if (stages == 0 || !does_not_fit) return error;
  cudaGetLastError();  // or the next call to look would find it
  return launch_with_stages(0, begin, bucket, groups, options, workspace, stream);
}

}  // namespace fused_lars
