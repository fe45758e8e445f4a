"""Loss scaling: ranks that share parameters skip a step together, or not at all."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import distributed_nets as nets
from distributed_harness import on_ranks
from distributed_nets import batches, full, loss_of, make_net, make_optimizer, train
from fused_lars import LARS


def whole_values(model) -> list[torch.Tensor]:
    return [full(p.detach()).clone() for p in model.parameters()]


@on_ranks(2, 4)
@pytest.mark.parametrize(
    ("layout", "decayed_norm"),
    [("sharded", False), ("sharded", True), ("sharded_by_layer", False), ("hybrid", False),
     ("tensor_parallel", True)],
)  # fmt: skip
def test_grad_scaler(layout, decayed_norm):
    """Steps 0 and 3 overflow, only in the last shard and its replicas. Others are as without a scaler."""
    reference = make_net()
    reference_optimizer = make_optimizer(reference, decayed_norm=decayed_norm)
    model, data = getattr(nets, layout)(make_net())
    optimizer = make_optimizer(model, decayed_norm=decayed_norm, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step, (x, y) in enumerate(batches(5)):
        scaler.scale(loss_of(model, x, y, data)).backward()
        overflows = step in (0, 3)
        mesh = next(model.parameters()).device_mesh
        if overflows and mesh.get_local_rank(mesh.ndim - 1) == mesh.size(mesh.ndim - 1) - 1:
            next(p.grad.to_local() for p in model.parameters() if p.grad.to_local().numel()).view(-1)[0] = (
                torch.inf
            )
        before = whole_values(model)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if overflows:
            assert all(map(torch.equal, before, whole_values(model)))
        else:
            train(reference, reference_optimizer, steps=1, first=step)
            assert max(nets.errors(model, reference).values()) <= nets.TOLERANCE
    assert scaler.get_scale() == 256.0


@on_ranks(2, 4)
def test_unscaled_and_clipped():
    reference = make_net()
    reference_optimizer = make_optimizer(reference)
    model, data = nets.sharded(make_net())
    optimizer = make_optimizer(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for x, y in batches(5):
        scaler.scale(loss_of(model, x, y, data)).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        loss_of(reference, x, y).backward()
        torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.1)
        reference_optimizer.step()
        reference_optimizer.zero_grad()
    assert max(nets.errors(model, reference).values()) <= nets.TOLERANCE


@on_ranks(2, 4)
@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("found", [0.0, 1.0, 2.0])
def test_found_inf_of_one_rank(found, foreach):
    """Set by hand on the last rank only, with a plain parameter and one on a second mesh."""
    world = dist.get_world_size()
    pairs = init_device_mesh("cpu", (world // 2, 2))
    values = torch.arange(12.0).view(6, 2)
    params = [
        nn.Parameter(distribute_tensor(values, init_device_mesh("cpu", (world,)), [Shard(0)])),
        nn.Parameter(distribute_tensor(values, pairs, [Shard(0), Shard(0)])),
        nn.Parameter(values.clone()),
    ]
    optimizer = LARS(params, lr=0.5, momentum=0.9, foreach=foreach)
    optimizer.found_inf = torch.tensor(found if dist.get_rank() == world - 1 else 0.0)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    moved = [not torch.equal(full(p.detach()), values) for p in params]
    assert moved == [found == 0.0] * 3
    assert all(
        bool(full(state["momentum_buffer"]).any()) == (found == 0.0) for state in optimizer.state.values()
    )


@on_ranks(4)
def test_found_inf_within_nested_meshes():
    """The mesh of all ranks carries found_inf from one pair to the other."""
    pairs = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
    values = torch.arange(12.0).view(6, 2)
    params = [
        nn.Parameter(distribute_tensor(values, pairs["inner"], [Shard(0)])),
        nn.Parameter(distribute_tensor(values, init_device_mesh("cpu", (4,)), [Shard(0)])),
    ]
    optimizer = LARS(params, lr=0.5)
    optimizer.found_inf = torch.tensor(float(dist.get_rank() == 3))
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert all(torch.equal(full(p.detach()), values) for p in params)


@on_ranks(2)
def test_grad_scaler_without_gradients():
    """Then it gives the number 0: on all ranks, or on one while another has a tensor."""
    values = torch.arange(12.0).view(6, 2)
    param = nn.Parameter(distribute_tensor(values, init_device_mesh("cpu", (2,)), [Shard(0)]))
    optimizer = LARS([param], lr=0.5, momentum=0.9, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)
    assert torch.equal(full(param.detach()), values)
    optimizer.found_inf = 0
    if dist.get_rank() == 0:
        optimizer.found_inf, param.grad = torch.zeros(()), torch.ones_like(param)
    optimizer.step()
    moved = (full(param.detach()) != values).any(dim=1)
    assert moved.tolist() == [True] * 3 + [False] * 3


@on_ranks(2)
def test_gradients_that_only_one_rank_has_unscaled():
    """GradScaler leaves the scale None there. A step would add up norms of different units."""
    values = torch.arange(12.0).view(6, 2)
    param = nn.Parameter(distribute_tensor(values, init_device_mesh("cpu", (2,)), [Shard(0)]))
    optimizer = LARS([param], lr=0.5, momentum=0.9, fused=True)
    param.grad = torch.ones_like(param)
    optimizer.found_inf = torch.zeros(())
    optimizer.grad_scale = None if dist.get_rank() == 0 else torch.tensor(4.0)
    with pytest.raises(ValueError, match=r"has (a|no) grad_scale, unlike rank"):
        optimizer.step()
    assert torch.equal(full(param.detach()), values)
