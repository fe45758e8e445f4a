"""A DTensor step that reuses what the last step gathered gives the same bits as one that gathers again."""

import gc
import weakref
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import distributed_nets as nets
from distributed_harness import on_ranks
from fused_lars import LARS
from fused_lars._sharded import gathered
from stepping import same_bits

STEPS = 6
CHANGED = 3  # the step before which something changes


def make(dtype=torch.float32, **options):
    mesh = nets.mesh_1d()
    generator = torch.Generator().manual_seed(0)
    shapes = [(6, 5), (7,), (3, 4)]
    values = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    params = [nn.Parameter(distribute_tensor(v, mesh, [Shard(0)])) for v in values]
    params.append(nn.Parameter(distribute_tensor(torch.ones(5, dtype=dtype), mesh, [Replicate()])))
    params.append(nn.Parameter(torch.ones(4, dtype=dtype)))  # not a DTensor
    groups = [{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.0}]
    options = {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.1, "trust_coefficient": 0.1, **options}
    return params, LARS(groups, **options)


def set_grads(params, step):
    generator = torch.Generator().manual_seed(step)
    for p in params:
        grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        if isinstance(p, DTensor):
            grad = distribute_tensor(grad, p.device_mesh, p.placements)
        p.grad = grad


def nothing(params, optimizer):
    pass


def another_lr(params, optimizer):
    optimizer.param_groups[1]["lr"] = 0.25


def lr_as_a_tensor(params, optimizer):
    optimizer.param_groups[0]["lr"] = torch.tensor(0.25)


def decayed_norm(params, optimizer):
    optimizer.param_groups[0]["decayed_norm"] = True


def no_momentum(params, optimizer):
    optimizer.param_groups[0]["momentum"] = 0.0


def dampening(params, optimizer):
    optimizer.param_groups[0].update(classic_momentum=False, dampening=0.5)


def ordinary_operators(params, optimizer):
    optimizer.param_groups[1]["foreach"] = True


def a_missing_gradient(params, optimizer):
    params[0].grad = None


def loaded_state(params, optimizer):
    state = optimizer.state_dict()
    for values in state["state"].values():
        values["momentum_buffer"] = values["momentum_buffer"] * 0.5
    optimizer.load_state_dict(state)


def another_buffer(params, optimizer):
    values = optimizer.state[params[1]]
    values["momentum_buffer"] = values["momentum_buffer"] * 0.5


def other_local_tensor(params, optimizer):
    """As when a module is moved and fully_shard replaces its local tensors."""
    params[0]._local_tensor = params[0]._local_tensor.detach() * 2


def partial_gradient(params, optimizer):
    """The gradient of a replicated parameter, as sequence parallelism leaves it."""
    local = params[3].grad.to_local() / dist.get_world_size()
    params[3].grad = DTensor.from_local(local, params[3].device_mesh, [Partial()], run_check=False)


def another_parameter(params, optimizer):
    params.append(nn.Parameter(distribute_tensor(torch.ones(6, 2), nets.mesh_1d(), [Shard(0)])))
    optimizer.add_param_group({"params": [params[-1]]})
    set_grads(params, CHANGED)


def overflow(params, optimizer):
    optimizer.found_inf = torch.tensor(float(dist.get_rank()))
    optimizer.grad_scale = torch.tensor(2.0)


CHANGES = [
    nothing, another_lr, lr_as_a_tensor, decayed_norm, no_momentum, dampening, ordinary_operators,
    a_missing_gradient, loaded_state, another_buffer, other_local_tensor, partial_gradient,
    another_parameter, overflow,
]  # fmt: skip


def run(change, keeps: bool, **options):
    params, optimizer = make(**options)
    kept = []
    for step in range(STEPS):
        set_grads(params, step)
        if step == CHANGED:
            change(params, optimizer)
        if not keeps and optimizer._sharding is not None:
            optimizer._sharding._gathered = None
        kept.append(optimizer._sharding._gathered is not None)
        optimizer.step()
        if step == CHANGED:
            optimizer.__dict__.pop("found_inf", None)
            optimizer.__dict__.pop("grad_scale", None)
    assert any(kept) == keeps
    tensors = [*params, *(t for values in optimizer.state.values() for t in values.values())]
    tensors += optimizer.trust_ratios().values()
    return [t.to_local() if isinstance(t, DTensor) else t for t in tensors]


@on_ranks(2)
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_same_bits(change):
    results = [run(change, keeps) for keeps in (True, False)]
    assert all(map(same_bits, *results))


@on_ranks(2)
def test_same_bits_with_masters():
    results = [run(nothing, keeps, dtype=torch.bfloat16, master_weights=True) for keeps in (True, False)]
    assert all(map(same_bits, *results))


@on_ranks(2)
def test_a_repeated_step_gathers_no_lists():
    params, optimizer = make()
    with mock.patch.object(gathered, "append_group", wraps=gathered.append_group) as append:
        for step in range(4):
            set_grads(params, step)
            optimizer.step()
    assert append.call_count == 4  # in the first step: two groups, with and without DTensors


@on_ranks(2)
@pytest.mark.parametrize("foreach", [False, True])
def test_every_step_raises_version_counters(foreach):
    """Of DTensors and of what they hold, so that autograd notices the change."""
    params, optimizer = make(foreach=foreach)
    for step in range(4):
        set_grads(params, step)
        tensors = [*params, *(p._local_tensor for p in params if isinstance(p, DTensor))]
        before = [t._version for t in tensors]
        optimizer.step()
        assert all(t._version > version for t, version in zip(tensors, before))


@on_ranks(2)
def test_gradients_are_not_kept_alive():
    params, optimizer = make()
    for step in range(3):
        set_grads(params, step)
        locals_ = [weakref.ref(p.grad._local_tensor if isinstance(p, DTensor) else p.grad) for p in params]
        optimizer.step()
        optimizer.zero_grad()
        gc.collect()
        assert [ref() for ref in locals_] == [None] * len(params)


@on_ranks(2)
def test_a_failed_step_keeps_no_gradient_alive():
    param = nn.Parameter(distribute_tensor(torch.ones(4), nets.mesh_1d(), [Replicate()]))
    optimizer = LARS([param], lr=0.1)
    for step in range(4):
        set_grads([param], step)
        if step == 3:
            param.grad._local_tensor = param.grad._local_tensor.double()
        local = weakref.ref(param.grad._local_tensor)
        if step == 3:
            with pytest.raises(ValueError, match="dtype Double"):
                optimizer.step()
        else:
            optimizer.step()
        optimizer.zero_grad()
        gc.collect()
        assert local() is None


@on_ranks(2)
def test_an_error_in_a_repeated_step_names_the_parameter():
    params, optimizer = make()
    for step in range(3):
        set_grads(params, step)
        optimizer.step()
    before = [p.detach().clone() for p in params]
    set_grads(params, 3)
    params[1].grad._local_tensor = params[1].grad._local_tensor.double()
    with pytest.raises(ValueError, match=r"^grads\[3\] has dtype Double.*\['params'\]\[1\]"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, params))
    set_grads(params, 3)
    optimizer.step()


@on_ranks(2)
@pytest.mark.parametrize("lr", [torch.tensor(1), "0.1", None, torch.ones(2)], ids=str)
def test_an_lr_of_the_wrong_kind_on_one_rank_steps_none(lr):
    """It is found before the message, also if its value is that of the other rank."""
    params, optimizer = make(lr=1.0)
    for step in range(3):
        set_grads(params, step)
        optimizer.step()
    before = [p.detach().clone() for p in params]
    set_grads(params, 3)
    if dist.get_rank() == 1:
        optimizer.param_groups[0]["lr"] = lr
        with pytest.raises(
            ValueError, match=r"lr (of|in) group 0|Tensor lr must be 1-element; lr in group 0"
        ):
            optimizer.step()
    else:
        with pytest.raises(RuntimeError, match=r"rank 1 cannot step, so no rank has: ValueError: .*lr"):
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, params))
    optimizer.param_groups[0]["lr"] = 1.0
    optimizer.step()
