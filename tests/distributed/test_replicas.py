"""Replicas stay equal to the bit, and a run can be repeated to the bit."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

import distributed_nets as nets
from distributed_harness import on_ranks
from distributed_nets import make_net, make_optimizer, train


def local_bits(params) -> torch.Tensor:
    local = [p.to_local() if isinstance(p, DTensor) else p for p in params]
    return torch.cat([p.detach().reshape(-1).view(torch.int32) for p in local])


def assert_same_on(group, bits) -> None:
    everyone = [torch.empty_like(bits) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, bits, group=group)
    assert all(torch.equal(bits, other) for other in everyone)


@on_ranks(2, 4)
@pytest.mark.parametrize("foreach", [False, True])
def test_replicas_of_ddp_for_50_steps(foreach):
    model, data = nets.replicated(make_net())
    optimizer = make_optimizer(model, foreach=foreach)
    for step in range(50):
        train(model, optimizer, data, steps=1, first=step)
        assert_same_on(None, local_bits(model.parameters()))


@on_ranks(4)
def test_replicas_of_hybrid_sharding():
    model, data = nets.hybrid(make_net())
    mesh = next(model.parameters()).device_mesh
    optimizer = make_optimizer(model)
    for step in range(20):
        train(model, optimizer, data, steps=1, first=step)
        assert_same_on(mesh.get_group("replicate"), local_bits(model.parameters()))


@on_ranks(4)
def test_replicated_parameters_of_tensor_parallelism():
    """Norm weights and the last bias are whole on every rank."""
    model, data = nets.tensor_parallel(make_net())
    train(model, make_optimizer(model), data, steps=20)
    whole = [p for p in model.parameters() if p.placements[0].is_replicate()]
    assert len(whole) == 7
    assert_same_on(None, local_bits(whole))


@on_ranks(2, 4)
@pytest.mark.parametrize("layout", ["sharded", "hybrid", "tensor_parallel", "sharded_over_tensor_parallel"])
def test_a_run_repeated(layout):
    bits = []
    for _ in range(2):
        model, data = getattr(nets, layout)(make_net())
        train(model, make_optimizer(model), data, steps=10)
        bits.append(local_bits(model.parameters()))
    assert torch.equal(*bits)
