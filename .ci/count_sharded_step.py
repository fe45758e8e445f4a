"""Counts what a step on sharded CUDA parameters does on one of two ranks, under the simulator of .ci/run.

Exits 1 where there are more than 2 launches, more host synchronisations, copies or memsets than those of
the all-reduce itself and of the look at the step before, or more DRAM bytes for an element of the shard than
the limit: 20 and a little where its weights and gradients fit in L2 (50 MB), since the update begins with
what the norm pass read last, and 28 where they do not.
"""

import socket
import sys
from functools import partial

import cudasim_torch
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import fused_lars

RANKS = 2
# A last row on its way to the host, for which the step waits that comes after.
LOOK = {"memcpy_d2h": 1, "host_syncs": 1}
# Rows and columns, in two groups: weights, and what stands for biases and norms.
CASES = {
    "8 MB of weights and gradients": (20.6, [(512, 512)] * 7 + [(1024, 256)], [(512,)] * 8),
    "as ResNet-50, 102 MB": (28.0, [(2048, 512)] * 23 + [(1000, 1024)], [(512,)] * 106),
}


def make_parameter(shape, mesh) -> torch.nn.Parameter:
    return torch.nn.Parameter(distribute_tensor(torch.randn(shape).cuda() * 0.05, mesh, [Shard(0)]))


def counts(step):
    cudasim_torch.l2_flush()
    cudasim_torch.reset_stats()
    step()
    return cudasim_torch.stats()


def collective(api) -> dict:
    return {name: api[name] for name in ("host_syncs", "memcpy_h2d", "memcpy_d2h", "memcpy_d2d", "memsets")}


def run(rank: int, port: int) -> None:
    torch.set_num_threads(1)
    torch.cuda.set_device(rank % torch.cuda.device_count())
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS)
    mesh = init_device_mesh("cuda", (RANKS,))
    failed = []
    for name, (limit, *groups) in CASES.items():
        groups = [[make_parameter(shape, mesh) for shape in shapes] for shapes in groups]
        params = [p for group in groups for p in group]
        optimizer = fused_lars.LARS(
            [{"params": groups[0]}, {"params": groups[1], "weight_decay": 0.0, "layer_adaptation": False}],
            lr=0.5,
            momentum=0.9,
            weight_decay=1e-4,
        )
        for _ in range(2):  # the first makes state
            for p in params:
                p.grad = torch.ones_like(p)
            stats = counts(optimizer.step)
        api, totals = stats["api"], stats["totals"]
        norms = torch.zeros(len(params) + 1, 2, dtype=torch.float64, device="cuda")
        own = collective(counts(partial(dist.all_reduce, norms))["api"])
        n = sum(p.to_local().numel() for p in params)
        dram = (totals["dram_read_bytes"] + totals["dram_write_bytes"] + totals["l2_dirty_bytes"]) / n
        extra = {key: value - own[key] for key, value in collective(api).items()}
        if totals["launches"] > 2 or dram > limit or any(n > LOOK.get(key, 0) for key, n in extra.items()):
            failed.append(name)
        if rank == 0:
            print(
                f"{name:30s} {len(params)} parameters, {n:,} elements a rank: launches {totals['launches']}  "
                f"DRAM B/param {dram:.2f} (limit {limit})  message {16 * len(norms)} B  "
                f"beyond the all-reduce: {extra}  (the all-reduce: {own})"
            )
    dist.destroy_process_group()
    if failed:
        sys.exit(f"over the limit: {', '.join(failed)}")


if __name__ == "__main__":
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    mp.start_processes(run, args=(port,), nprocs=RANKS, start_method="spawn")
