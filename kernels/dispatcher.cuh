#pragma once

// How a block's two roles work together. Seven warps are workers: they load, sum and update tiles. One warp
// is the dispatcher: it draws tickets, looks up what they stand for, publishes norms and waits for trust
// ratios. So the latencies of tickets and ratios are not in the workers' way. On a GPU under load each of
// them takes one to two microseconds, as long as a tile's own loads.
//
// The dispatcher hands out one assignment a turn, while the workers are at the one before. What they share is
// double-buffered: even and odd turns have a copy each. The dispatcher writes for turn t when the workers are
// done with turn t - 2.

#include "plan.h"
#include "ratios.cuh"
#include "work.cuh"

namespace fused_lars {

constexpr int kThreads = kWorkers + 32;

enum class Task : uint32_t {
  none,         // the block is done
  norms,        // take a tile's norms
  norms_kept,   // the same, and keep the tile in a stage
  update,       // load a tile and update it
  update_kept,  // update the tile of a stage
  wait,         // never handed out: the dispatcher has nothing that can be done yet
};

struct Assignment {
  Task task;
  uint32_t takes_norms;  // a word, as in Work
  uint32_t work;         // which one of BlockShared::works
  uint32_t stage;        // where the tile is kept
};

// One more than stages: while the next tile is kept, workers may still read the Work of the update that was
// handed out last.
constexpr uint32_t kKeptWorks = kMostStages + 1;

template <typename Types>
struct BlockShared {
  Assignment assignments[2];
  Work<Types> works[kKeptWorks + 2];  // of kept tiles, then of others
  Coefficients<typename Types::Compute> coefficients[2];
  Sums<typename Types::Compute> warp_sums[2][kWorkerWarps];
};

// ---------------------------------------------------------------- barriers of workers and dispatcher

// Named barriers of the block; __syncthreads() has number 0. Those with two numbers are for even and odd
// turns.
constexpr uint32_t kAssigned = 1;  // the turn's assignment is there, with coefficients if it needs no norms
constexpr uint32_t kDone = 3;      // the workers have done it; a norm item's sums are there
constexpr uint32_t kSummed = 5;    // an update that takes norms itself: the sums are there
constexpr uint32_t kCoefficients = 6;  // ... and then the coefficients

// Waits for the other role. What it wrote before it arrived can be read.
__device__ __forceinline__ void wait_for(uint32_t barrier) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "n"(kThreads) : "memory");
}
__device__ __forceinline__ void arrive_at(uint32_t barrier) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "n"(kThreads) : "memory");
}

// ---------------------------------------------------------------- the dispatcher

// What its first lane knows.
template <typename Types>
class Dispatcher {
 public:
  __device__ __forceinline__ Dispatcher(const Parameters& p, BlockShared<Types>& shared, bool is_used)
      : p_(p), shared_(shared) {
    if (!is_used) return;
    memset(shared_.coefficients, 0, sizeof shared_.coefficients);  // vector loads read their padding too
    draw_ticket();
  }

  // What to do next. Norms come first, so that updates find their trust ratios.
  __device__ __forceinline__ Task choose() {
    if (holds_ticket_ && !is_looked_up_) {
      is_looked_up_ = true;
      task_of_ticket_ = find_item();
    }
    const bool takes_norms = task_of_ticket_ == Task::norms || task_of_ticket_ == Task::norms_kept;
    if (holds_ticket_ && takes_norms) return task_of_ticket_;
    if (kept_ != 0) {
      return ratio_is_known(shared_.works[oldest_work_].item.tensor) ? Task::update_kept : Task::wait;
    }
    if (task_of_ticket_ == Task::update && has_norm_items(p_, item_.tensor) &&
        !ratio_is_known(item_.tensor)) {
      return Task::wait;
    }
    return task_of_ticket_;
  }

  // Writes the assignment of a task that choose() has returned.
  __device__ __forceinline__ void hand_out(Task task, uint32_t turn) {
    Assignment assignment = {task, false, oldest_work_, oldest_stage_};
    if (task == Task::update_kept) {
      oldest_work_ = wrap(oldest_work_ + 1, kKeptWorks);
      oldest_stage_ = wrap(oldest_stage_ + 1, p_.order.stages);
      --kept_;
      set_coefficients(shared_.works[assignment.work].item, decode_ratio(ratio_), turn);
    } else if (task != Task::none) {
      holds_ticket_ = false;
      if (task == Task::norms_kept) {
        assignment.work = wrap(oldest_work_ + kept_, kKeptWorks);
        assignment.stage = wrap(oldest_stage_ + kept_, p_.order.stages);
        ++kept_;
      } else {
        assignment.work = kKeptWorks + (other_work_ ^= 1);
      }
      Work<Types>& work = shared_.works[assignment.work];
      look_up(p_, item_, work);
      assignment.takes_norms = work.takes_norms;
      if (!work.takes_norms) {
        const double q =
            has_norm_items(p_, item_.tensor) ? decode_ratio(ratio_) : trust_ratio_without_norms(p_, item_);
        set_coefficients(item_, q, turn);
      }
    }
    shared_.assignments[turn] = assignment;
    // Only with room for its tile, see order.h. A launch that keeps nothing needs none.
    if (!holds_ticket_ && (kept_ < p_.order.stages || p_.order.stages == 0)) draw_ticket();
  }

  __device__ __forceinline__ void set_coefficients(const WorkItem& item, double q, uint32_t turn) {
    shared_.coefficients[turn] = update_coefficients<Types>(p_, item, q);
  }

 private:
  static __device__ __forceinline__ uint32_t wrap(uint32_t i, uint32_t count) {
    return i < count ? i : i - count;
  }

  // The ticket is looked at a turn later, when it has arrived.
  __device__ __forceinline__ void draw_ticket() {
    ticket_ = DeviceAtomic<uint32_t>(*p_.workspace.tickets).fetch_add(1, cuda::memory_order_relaxed);
    holds_ticket_ = true;
    is_looked_up_ = false;
  }

  __device__ __forceinline__ Task find_item() {
    if (ticket_ >= ticket_count(p_.order.items)) return Task::none;
    item_ = work_item(p_.order, ticket_, [&](uint32_t i) { return p_.items_before(i); }, item_.tensor);
    if (item_.is_update) return Task::update;
    const uint32_t not_kept =
        p_.items_before(item_.tensor + 1).updates - p_.items_before(item_.tensor).updates;
    return p_.pass == Pass::norms || item_.tile < not_kept ? Task::norms : Task::norms_kept;
  }

  // Most tiles that a block keeps are of few tensors, so the last ratio is often the one.
  __device__ __forceinline__ bool ratio_is_known(uint32_t tensor) {
    if (ratio_ == 0 || ratio_of_ != tensor) {
      ratio_of_ = tensor;
      ratio_ = DeviceAtomic<uint64_t>(p_.workspace.ratios[tensor]).load(cuda::memory_order_acquire);
    }
    return ratio_ != 0;
  }

  const Parameters& p_;
  BlockShared<Types>& shared_;
  uint32_t ticket_;
  bool holds_ticket_, is_looked_up_;
  Task task_of_ticket_;
  WorkItem item_ = {};
  uint32_t kept_ = 0;  // tiles, of which the oldest one is updated first
  uint32_t oldest_work_ = 0, oldest_stage_ = 0;
  uint32_t other_work_ = 0;
  uint32_t ratio_of_;  // a tensor
  uint64_t ratio_ = 0;
};

// The partials of the tile that the workers have summed.
template <typename Types>
__device__ __forceinline__ Sums<double> summed_partials(const BlockShared<Types>& shared, uint32_t turn) {
  const Work<Types>& work = shared.works[shared.assignments[turn].work];
  Sums<typename Types::Compute> sums = shared.warp_sums[turn][0];
#pragma unroll
  for (int warp = 1; warp < kWorkerWarps; ++warp) {
    sums.weight += shared.warp_sums[turn][warp].weight;
    sums.grad += shared.warp_sums[turn][warp].grad;
  }
  return tile_partials(work.tile, sums, work.norm_of());
}

// What the dispatcher owes the workers, or the other blocks, once a turn's sums are there.
template <typename Types>
__device__ __forceinline__ void use_sums(const Parameters& p, BlockShared<Types>& shared, uint32_t turn,
                                         Dispatcher<Types>& dispatcher) {
  const Assignment& assignment = shared.assignments[turn];
  const Work<Types>& work = shared.works[assignment.work];
  if (assignment.task != Task::update) {
    wait_for(kDone + turn);
    count_norm_item(p, work, summed_partials(shared, turn));
    return;
  }
  wait_for(kSummed);
  const Sums<double> partial = summed_partials(shared, turn);
  if (threadIdx.x % 32 == 0) {
    const Sums<double> norms = {decode_norm(partial.weight), decode_norm(partial.grad)};
    record_norms(p, work.item.tensor, norms);
    dispatcher.set_coefficients(work.item, trust_ratio(p, work.item.tensor, norms), turn);
  }
  __syncwarp();
  arrive_at(kCoefficients);
}

// The dispatcher's warp.
template <typename Types>
__device__ __forceinline__ void dispatch(const Parameters& p, BlockShared<Types>& shared) {
  const bool is_first_lane = threadIdx.x % 32 == 0;
  Dispatcher<Types> dispatcher(p, shared, is_first_lane);
  // In all lanes the first one's.
  const auto hand_out = [&](Task task, uint32_t turn) {
    if (is_first_lane && task != Task::wait) dispatcher.hand_out(task, turn);
    __syncwarp();
    task = static_cast<Task>(__shfl_sync(~0u, static_cast<uint32_t>(task), 0));
    if (task != Task::wait) arrive_at(kAssigned + turn);
    return task;
  };
  bool has_sums = false;                               // the assignment of the turn before
  bool was_update = false, was_update_before = false;  // that one, and the one before it
  for (uint32_t turn = 0;; turn ^= 1) {
    if (was_update_before) wait_for(kDone + turn);
    Task task = hand_out(is_first_lane ? dispatcher.choose() : Task::wait, turn);
    if (has_sums) use_sums(p, shared, turn ^ 1, dispatcher);
    if (task == Task::wait) {
      // Only now: another block may wait for norms that were counted above.
      if (is_first_lane) {
        while ((task = dispatcher.choose()) == Task::wait) __nanosleep(64);
      }
      task = hand_out(task, turn);
    }
    if (task == Task::none) {
      if (was_update) wait_for(kDone + (turn ^ 1));
      return;
    }
    has_sums = shared.assignments[turn].takes_norms;
    was_update_before = was_update;
    was_update = task == Task::update || task == Task::update_kept;
  }
}

// ---------------------------------------------------------------- the workers

template <typename Types>
__device__ __forceinline__ void work_off(BlockShared<Types>& shared, unsigned char* stages) {
  for (uint32_t turn = 0;; turn ^= 1) {
    wait_for(kAssigned + turn);
    const Assignment assignment = shared.assignments[turn];
    if (assignment.task == Task::none) return;
    const Work<Types>& work = shared.works[assignment.work];
    const Tile<Types> tile = work.tile;
    unsigned char* stage = stages + assignment.stage * Types::kStageBytes;
    TileAgent<Types> agent;
    if (assignment.task == Task::update_kept) {
      agent.load_kept(tile, stage);
    } else if (assignment.task == Task::update) {
      agent.template load<true>(tile);
    } else {
      agent.template load<false>(tile);
    }
    if (assignment.takes_norms) {
      const auto sums = agent.squared_sums_of_warp(work.norm_of());
      if (threadIdx.x % 32 == 0) shared.warp_sums[turn][threadIdx.x / 32] = sums;
      if (assignment.task == Task::norms_kept) agent.keep(stage);
      if (assignment.task != Task::update) {
        arrive_at(kDone + turn);
        continue;
      }
      arrive_at(kSummed);
      wait_for(kCoefficients);
    }
    agent.update(tile, shared.coefficients[turn]);
    arrive_at(kDone + turn);
  }
}

}  // namespace fused_lars
