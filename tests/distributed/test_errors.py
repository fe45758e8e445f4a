"""Parameters that cannot be stepped are refused by name, before anything has changed."""

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import distributed_nets as nets
from distributed_harness import on_ranks
from distributed_nets import make_net, make_optimizer, train
from fused_lars import LARS


def make_param(placement, mesh=None) -> nn.Parameter:
    mesh = mesh or init_device_mesh("cpu", (2,))
    return nn.Parameter(DTensor.from_local(torch.ones(4, 4), mesh, [placement]))


@on_ranks(2)
def test_partial_parameter():
    whole, partial = make_param(Replicate()), make_param(Partial())
    with pytest.raises(
        ValueError, match=r"parameter 'b', param_groups\[0\]\['params'\]\[1\] has placements .*Partial"
    ):
        LARS([("a", whole), ("b", partial)])
    optimizer = LARS([whole])
    with pytest.raises(
        ValueError, match=r"parameter param_groups\[1\]\['params'\]\[0\] has placements .*Partial"
    ):
        optimizer.add_param_group({"params": [partial]})
    assert len(optimizer.param_groups) == 1


@on_ranks(2)
@pytest.mark.parametrize("use_orig_params", [False, True])
def test_flat_parameters(use_orig_params):
    model = FullyShardedDataParallel(
        make_net(), use_orig_params=use_orig_params, device_id=torch.device("cpu")
    )
    with pytest.raises(ValueError, match=r"FSDP1.*fully_shard"):
        LARS(model.parameters())
    with pytest.raises(ValueError, match=r"parameter '.*', param_groups\[0\]\['params'\]\[0\] .*FSDP1"):
        LARS(model.named_parameters())


@on_ranks(2)
def test_gradient_without_placement():
    param = make_param(Shard(0))
    optimizer = LARS([("weight", param)])
    param.grad = torch.ones(8, 4)
    with pytest.raises(
        ValueError, match=r"gradient of parameter 'weight', .* is no DTensor; expected a DTensor on"
    ):
        optimizer.step()
    assert torch.equal(param.to_local(), torch.ones(4, 4))


@on_ranks(2)
def test_gradient_on_another_mesh():
    param = make_param(Shard(0))
    optimizer = LARS([param])
    other = init_device_mesh("cpu", (1, 2))
    param.grad = distribute_tensor(torch.ones(8, 4), other, [Replicate(), Shard(0)])
    with pytest.raises(ValueError, match=r"gradient of parameter .* is on .*; expected a DTensor on"):
        optimizer.step()


@on_ranks(2)
def test_differentiable():
    param = make_param(Shard(0))
    optimizer = LARS([param], differentiable=True)
    param.grad = torch.ones_like(param)
    with pytest.raises(ValueError, match=r"param_groups\[0\] has differentiable=True and sharded parameters"):
        optimizer.step()


@on_ranks(2)
@pytest.mark.parametrize("state", ["whole", "otherwise"])
def test_state_sharded_otherwise(state):
    model, data = nets.sharded(make_net())
    optimizer = make_optimizer(model)
    train(model, optimizer, data, steps=1)
    saved = optimizer.state_dict()
    buffer = saved["state"][0]["momentum_buffer"]
    wrong = buffer.full_tensor() if state == "whole" else buffer.redistribute(placements=[Shard(1)])
    saved["state"][0] = {"momentum_buffer": wrong}
    before = [
        t.to_local().clone()
        for t in (*model.parameters(), optimizer.state[next(model.parameters())]["momentum_buffer"])
    ]
    with pytest.raises(
        ValueError, match=r"momentum_buffer of parameter 0 .* is .*; expected .*set_optimizer_state_dict"
    ):
        optimizer.load_state_dict(saved)
    after = [
        t.to_local()
        for t in (*model.parameters(), optimizer.state[next(model.parameters())]["momentum_buffer"])
    ]
    assert all(map(torch.equal, before, after))


@on_ranks(2)
def test_gradients_placed_otherwise():
    """Not an error: a gradient in any placement steps like the same gradient in the parameter's placement."""
    mesh = init_device_mesh("cpu", (2,))
    values = torch.arange(16.0).view(4, 4)
    for own in (Shard(0), Shard(1), Replicate()):
        steps = []
        for grad in (own, Shard(0), Shard(1), Replicate(), Partial()):
            param = nn.Parameter(distribute_tensor(values.clone(), mesh, [own]))
            share = values / 2 if grad.is_partial() else values
            param.grad = (
                DTensor.from_local(share, mesh, [grad])
                if grad.is_partial()
                else distribute_tensor(share, mesh, [grad])
            )
            LARS([param], lr=0.5, momentum=0.9, weight_decay=0.1).step()
            steps.append(param.full_tensor())
        assert all(torch.equal(step, steps[0]) for step in steps)
