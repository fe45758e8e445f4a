"""Measures the host's time for one step of many small parameters: plain, or sharded over two processes.

    python benchmarks/host_time.py
    torchrun --nproc-per-node 2 benchmarks/host_time.py

On a GPU, a step of small parameters takes as long as the host needs to launch it. So this measures steps with
almost no work of their own: parameters of 16 elements, on the CPU, with one thread. fully_shard makes the
sharded ones. Optimizers take turns. The printed figure is the median over steps of the main thread's CPU
time, which does not include waiting for messages of the other process.
"""

import argparse
import statistics
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import fused_lars

OPTIONS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}
OPTIMIZERS = {
    "fused_lars": lambda groups: fused_lars.LARS(groups, **OPTIONS),
    "torch SGD, fused": lambda groups: torch.optim.SGD(groups, **OPTIONS, fused=True),
    "torch SGD, one by one": lambda groups: torch.optim.SGD(groups, **OPTIONS, foreach=False),
    "torch SGD, foreach": lambda groups: torch.optim.SGD(groups, **OPTIONS, foreach=True),
}


class Model(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.params = nn.ParameterList(torch.randn(4, 4) for _ in range(count))

    def forward(self, x):
        return sum((x * p).sum() for p in self.params)


def make(name: str, count: int, mesh):
    """Makes an optimizer with two groups, as LARS has them, for parameters that have gradients."""
    model = Model(count)
    if mesh is not None:
        fully_shard(model, mesh=mesh)
    model(torch.randn(4, 4)).backward()
    params, third = [*model.parameters()], count // 3
    return OPTIMIZERS[name]([{"params": params[:third]}, {"params": params[third:], "weight_decay": 0.0}])


def measure(count: int, mesh, steps: int) -> dict[str, float]:
    """Returns the microseconds of a step for each optimizer that takes the parameters."""
    # torch's fused SGD takes no DTensors.
    names = [name for name in OPTIMIZERS if mesh is None or name != "torch SGD, fused"]
    optimizers = {name: make(name, count, mesh) for name in names}
    times = {name: [] for name in names}
    for step in range(steps + 5):  # the first steps create state
        for name, optimizer in optimizers.items():
            start = time.thread_time()
            optimizer.step()
            if step >= 5:
                times[name].append(time.thread_time() - start)
    return {name: 1e6 * statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--counts", type=int, nargs="+", default=[161, 400], help="of parameters (161 400)")
    parser.add_argument("--steps", type=int, default=300, help="(%(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    meshes = {"plain": None}
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
        meshes["sharded"] = init_device_mesh("cpu", (dist.get_world_size(),))
    for kind, mesh in meshes.items():
        for count in options.counts:
            results = measure(count, mesh, options.steps)
            if mesh is None or dist.get_rank() == 0:
                line = ", ".join(f"{name} {value:.0f} us" for name, value in results.items())
                print(f"{count} {kind} parameters: {line}", flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
