"""A small network and ways to spread it over ranks. Tests compare the result with that of one process."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from fused_lars import LARS, param_groups

WIDTH, SEQUENCE, BATCH = 12, 4, 8

# How far two fp32 runs of 10 steps may be apart, see relative_to_all(), with u = 2^-24.
# Each run rounds a weight 10 times, by u / 2 at most: 10 u for both runs.
# A gradient is a sum of at most 32 terms in any order. Their errors are random: sqrt(32) u of it.
# 10 steps move a weight by at most 0.83 of itself (lr 1, trust coefficient 0.02, momentum 0.9): 10 u.
# Measured: at most 0.6 u, on Intel and AMD, with AVX-512, AVX2 and SSE.
TOLERANCE = 20 * 2.0**-24


class Block(nn.Module):
    """A residual block as in transformers. Tensor and sequence parallelism can split it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Net(nn.Module):
    """On 4 ranks, `odd` has rows for three of them. `head` has 3 rows, so one rank has none."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.odd = nn.Linear(WIDTH, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(torch.tanh(self.odd(x)))


def make_net(dtype=torch.float32) -> Net:
    torch.manual_seed(1)
    return Net().to(dtype)


def make_optimizer(model, **options) -> LARS:
    # Without eps, a common wrong factor of both norms would cancel.
    options = {"lr": 1.0, "momentum": 0.9, "trust_coefficient": 0.02, "eps": 0.01, **options}
    return LARS(param_groups(model, weight_decay=1e-2), **options)


def batches(steps: int, first: int = 0):
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(BATCH, SEQUENCE, WIDTH, generator=generator)
        yield x, x[..., :3].roll(1, dims=1).sin()


def train(model, optimizer, data=(0, 1), steps: int = 10, first: int = 0) -> None:
    """Trains on batches. This rank takes part `data[0]` of `data[1]` of each."""
    for x, y in batches(steps, first):
        loss_of(model, x, y, data).backward()
        optimizer.step()
        optimizer.zero_grad()


def loss_of(model, x, y, data=(0, 1)):
    x, y = (t.chunk(data[1])[data[0]] for t in (x, y))
    return (model(x) - y).square().mean()


def all_ranks() -> tuple[int, int]:
    return dist.get_rank(), dist.get_world_size()


def mesh_1d():
    """All ranks on the CPU. Without a mesh, fully_shard would take a GPU if there is one."""
    return init_device_mesh("cpu", (dist.get_world_size(),))


def mesh_2d(*names: str):
    return init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=names)


# Each layout takes a net. It returns what to train, and this rank's part of the batches.


def replicated(net):
    return DistributedDataParallel(net), all_ranks()


def sharded(net):
    return fully_shard(net, mesh=mesh_1d()), all_ranks()


def sharded_by_layer(net):
    mesh = mesh_1d()
    for layer in (*net.blocks, net.head):
        fully_shard(layer, mesh=mesh)
    return fully_shard(net, mesh=mesh), all_ranks()


def hybrid(net):
    return fully_shard(net, mesh=mesh_2d("replicate", "shard")), all_ranks()


def tensor_parallel(net, mesh=None):
    mesh = mesh or mesh_1d()
    plan = {
        "blocks.0": PrepareModuleInput(
            input_layouts=Replicate(), desired_input_layouts=Shard(1), use_local_output=True
        ),
        "blocks.*.norm": SequenceParallel(),
        "blocks.*.up": ColwiseParallel(input_layouts=Shard(1)),
        "blocks.*.down": RowwiseParallel(output_layouts=Shard(1)),
        "odd": ColwiseParallel(input_layouts=Shard(1), use_local_output=False),
        "head": RowwiseParallel(),
    }  # fmt: skip
    return parallelize_module(net, mesh, plan), (0, 1)


def sharded_over_tensor_parallel(net):
    """fully_shard rejects uneven tensor parallelism, so the rest is only sharded over the data ranks."""
    mesh = mesh_2d("data", "tensor")
    plan = {
        "blocks.*.up": ColwiseParallel(),
        "blocks.*.down": RowwiseParallel(),
    }
    net = parallelize_module(net, mesh["tensor"], plan)
    return fully_shard(net, mesh=mesh["data"]), (mesh["data"].get_local_rank(), 2)


def partly_sharded(net):
    """Plain parameters beside sharded ones. The hook averages their gradients, as DDP's hook would."""
    mesh = mesh_1d()
    for block in net.blocks:
        fully_shard(block, mesh=mesh)
    for p in (*net.odd.parameters(), *net.head.parameters()):
        p.register_post_accumulate_grad_hook(lambda p: dist.all_reduce(p.grad.div_(dist.get_world_size())))
    return net, all_ranks()


def several_meshes(net):
    """Blocks sharded over all ranks, and the rest within pairs."""
    mesh, pairs = mesh_1d(), mesh_2d("replicate", "shard")
    for block in net.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(net.odd, mesh=pairs)
    fully_shard(net.head, mesh=pairs)
    return net, all_ranks()


def full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def errors(model, reference) -> dict[str, float]:
    """The distance of each parameter from the reference's, relative to the norm of the whole model.

    Other processors and other splits add up gradients in other orders, so two fp32 runs differ. The error of
    a sum is relative to its terms, and the terms of a tiny tensor can cancel. So the error has no bound
    relative to that tensor, but it has one relative to the model.
    """
    pairs = zip(model.named_parameters(), reference.parameters())
    return relative_to_all({name: (full(p.detach()), q.detach()) for (name, p), q in pairs})


def relative_to_all(pairs: dict) -> dict[str, float]:
    """The distance of each (tensor, expected) pair, relative to the norm of all expected tensors."""
    norm = torch.stack([expected.double().norm() for _, expected in pairs.values()]).norm()
    return {
        name: ((got.double() - expected.double()).norm() / norm).item()
        for name, (got, expected) in pairs.items()
    }
