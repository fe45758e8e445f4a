"""Every rank joins the all-reduce whatever it holds: empty shards, missing gradients, uneven groups."""

from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from distributed_harness import on_ranks
from distributed_nets import full
from fused_lars import LARS
from fused_lars._sharded import rank_sets

# 4 ranks share these rows evenly, unevenly, or so that one or three of them get none.
SHAPES = [(8, 3), (7, 2), (3, 5), (1, 4), (6,)]
OPTIONS = {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.1, "trust_coefficient": 0.1}


def tensors(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def shard(values):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return [distribute_tensor(value, mesh, [Shard(0)]) for value in values]


def parameters():
    """The same parameters twice, sharded and whole."""
    return [nn.Parameter(t) for t in shard(tensors(0))], [nn.Parameter(t) for t in tensors(0)]


def set_grads(sharded, whole, seed: int, missing=()) -> None:
    for i, (p, q, grad, part) in enumerate(zip(sharded, whole, tensors(seed), shard(tensors(seed)))):
        p.grad, q.grad = (None, None) if i in missing else (part.to(p.dtype), grad.to(q.dtype))


def assert_same(sharded, whole) -> None:
    for i, (p, q) in enumerate(zip(sharded, whole)):
        torch.testing.assert_close(
            full(p.detach()), q.detach(), rtol=1e-6, atol=1e-7, msg=lambda m, i=i: f"{i}: {m}"
        )


@on_ranks(2, 4)
@pytest.mark.parametrize("missing", [(), (0,), (1, 2), (0, 1, 2, 3), (0, 1, 2, 3, 4)])
def test_gradients_missing_everywhere(missing):
    sharded, whole = parameters()
    optimizers = LARS(sharded, **OPTIONS), LARS(whole, **OPTIONS)
    for step, without in enumerate([missing, (), missing]):
        set_grads(sharded, whole, step + 1, without)
        for optimizer in optimizers:
            optimizer.step()
        assert_same(sharded, whole)


@on_ranks(2, 4)
@pytest.mark.parametrize("decayed_norm", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_missing_on_one_rank(dtype, decayed_norm):
    """The missing gradient counts as zeros in the norms, and its shard is not changed."""
    sharded, whole = ([nn.Parameter(p.detach().to(dtype)) for p in params] for params in parameters())
    options = {**OPTIONS, "master_weights": True, "decayed_norm": decayed_norm}
    optimizers = LARS(sharded, **options), LARS(whole, **options)
    alone = dist.get_rank() == 1
    for step in (1, 2):
        set_grads(sharded, whole, step)
        before = [p.to_local().clone() for p in sharded]
        if step == 2:
            for p, q in zip(sharded, whole):
                rows = torch.arange(len(q)).chunk(dist.get_world_size())
                q.grad[rows[1] if len(rows) > 1 else []] = 0.0
                if alone:
                    p.grad = None
        for optimizer in optimizers:
            optimizer.step()
    for p, q, b in zip(sharded, whole, before):
        expected = distribute_tensor(q.detach(), p.device_mesh, [Shard(0)]).to_local()
        if alone:
            assert torch.equal(p.to_local(), b)
        else:
            torch.testing.assert_close(p.to_local().detach(), expected)


@on_ranks(4)
def test_a_rank_without_any_gradient():
    sharded, whole = parameters()
    optimizer = LARS(sharded, **OPTIONS)
    set_grads(sharded, whole, 1)
    if dist.get_rank() == 3:
        for p in sharded:
            p.grad = None
    optimizer.step()
    assert len(optimizer.trust_ratios()) == (0 if dist.get_rank() == 3 else len(sharded))


@on_ranks(4)
def test_frozen_parameters():
    sharded, whole = parameters()
    optimizers = LARS(sharded, **OPTIONS), LARS(whole, **OPTIONS)
    set_grads(sharded, whole, 1, missing=(0, 3))
    for i in (0, 3):
        sharded[i].requires_grad_(False)
    for optimizer in optimizers:
        optimizer.step()
    assert_same(sharded, whole)


@on_ranks(2, 4)
def test_groups_that_differ():
    """Ranks 1 to 3 hold nothing of the first group. Each has its own options, state and implementation."""
    sharded, whole = parameters()
    optimizers = []
    for params in (sharded, whole):
        groups = [
            {"params": params[3:4], "momentum": 0.0},
            {"params": params[:2], "classic_momentum": False, "dampening": 0.5},
            {"params": params[2:3], "foreach": True, "lr": torch.tensor(0.25)},
        ]
        optimizers.append(LARS(groups, **OPTIONS))
    for step in range(3):
        set_grads(sharded, whole, step)
        for optimizer, params in zip(optimizers, (sharded, whole)):
            optimizer.step()
            if step == 0:
                optimizer.add_param_group({"params": params[4:], "layer_adaptation": False})
        assert_same(sharded, whole)


@on_ranks(2)
def test_no_step_waits_for_a_rank_that_is_not_in_the_mesh():
    """One mesh has rank 0 only, one has both. Rank 1 holds no part of the first mesh's parameter."""
    sharded, whole = parameters()
    mesh = DeviceMesh("cpu", [0])
    alone = nn.Parameter(distribute_tensor(tensors(0)[0], mesh, [Shard(0)]))
    optimizers = LARS([*sharded, alone], **OPTIONS), LARS(whole, **OPTIONS)
    set_grads(sharded, whole, 1)
    if dist.get_rank() == 0:
        alone.grad = distribute_tensor(tensors(1)[0], mesh, [Shard(0)], src_data_rank=None)
    for optimizer in optimizers:
        optimizer.step()
    assert_same(sharded, whole)
    if dist.get_rank() == 0:
        assert_same([alone], whole)


@on_ranks(5)
def test_sharded_in_two_dimensions_of_a_part_of_the_world():
    """As in a pipeline stage: rank 4 is in none of the meshes and does not take part.

    No process group is made. The job would hang if only some of its ranks made one, or if they made it with
    different ranks.
    """
    mesh = DeviceMesh("cpu", [[0, 2], [1, 3]])
    member = dist.get_rank() < 4
    whole = [nn.Parameter(t) for t in tensors(0)[:3]]
    sharded = [nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0), Shard(0)])) for p in whole]
    other = nn.Parameter(
        distribute_tensor(tensors(0)[0], DeviceMesh("cpu", [[0, 1], [2, 3]]), [Shard(1), Shard(0)])
    )
    optimizers = LARS([*sharded, other], **OPTIONS), LARS([*whole], **OPTIONS)
    for step in (1, 2):
        for p, q, grad in zip([*sharded, other], [*whole, None], [*tensors(step)[:3], tensors(step)[0]]):
            part = distribute_tensor(grad, p.device_mesh, p.placements)
            if member:
                p.grad = part
            if q is not None:
                q.grad = grad
        with mock.patch.object(dist.distributed_c10d, "_new_group_with_tag", side_effect=AssertionError):
            for optimizer in optimizers[0 if member else 1 :]:
                optimizer.step()
    if member:
        assert_same([*sharded, other], [*whole, whole[0]])
        shared = [s.peers.ranks for s in optimizers[0]._sharding._rank_sets if s.peers]
        assert shared == [(0, 1, 2, 3)]


@on_ranks(4)
def test_ranks_and_process_groups():
    """The ranks that only differ in the given dimensions. Several dimensions are taken one after another."""
    mesh = init_device_mesh("cpu", (2, 2))
    rank, world = dist.get_rank(), dist.group.WORLD
    for dims, expected in (
        ((0,), (rank % 2, rank % 2 + 2)),
        ((1,), (rank - rank % 2, rank - rank % 2 + 1)),
        ((0, 1), (0, 1, 2, 3)),
    ):
        ranks, groups = rank_sets.ranks_and_groups(mesh, dims)
        assert ranks == expected
        assert groups == ((world,) if len(dims) == 2 else (mesh.get_group(dims[0]),))
        assert [tuple(dist.get_process_group_ranks(group)) for group in groups] == [expected]
