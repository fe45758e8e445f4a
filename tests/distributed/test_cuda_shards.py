"""Sharded CUDA parameters, over gloo: two processes, on two GPUs or on one."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from distributed_harness import on_ranks
from distributed_nets import TOLERANCE, all_ranks, batches, errors, make_net, make_optimizer
from fused_lars import LARS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch.cuda is not available")


def mesh_of_all() -> DeviceMesh:
    """All ranks, on the GPUs of this machine.

    Without TF32, a GPU's matrix products differ from a processor's only by the order of sums, as those of two
    processors do. tanh and rsqrt differ by 2 units in the last place. TOLERANCE is for twice as many steps.
    """
    torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
    torch.set_float32_matmul_precision("highest")
    return init_device_mesh("cuda", (dist.get_world_size(),))


def train(model, optimizer, data=(0, 1), scaler=None, steps=5) -> None:
    device = next(model.parameters()).device if scaler is None else "cuda"
    for x, y in batches(steps):
        x, y = (t.chunk(data[1])[data[0]].to(device) for t in (x, y))
        loss = (model(x) - y).square().mean()
        if scaler is None:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad()


def own_rows(whole):
    """The rows of a tensor that this rank holds."""
    rows = whole.split(-(-len(whole) // dist.get_world_size()))
    return rows[dist.get_rank()] if dist.get_rank() < len(rows) else whole[:0]


@on_ranks(2)
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"lr": "tensor"}], ids=str)
def test_trains_as_one_process(options, scaled):
    mesh = mesh_of_all()
    reference = make_net()
    train(reference, make_optimizer(reference))
    model = fully_shard(make_net().cuda(), mesh=mesh)
    if "lr" in options:
        options = {"lr": torch.ones((), device="cuda")}
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0) if scaled else None
    train(model, make_optimizer(model, **options), all_ranks(), scaler)
    assert all(p.to_local().is_cuda for p in model.parameters())
    assert max(errors(model.cpu(), reference).values()) <= TOLERANCE


@on_ranks(2)
def test_shards_and_others():
    """A plain parameter, an empty shard, a parameter without a gradient; found_inf on one rank only."""
    mesh = mesh_of_all()
    values = [torch.arange(30.0).view(5, 6), torch.ones(1, 3), torch.ones(4)]
    params = [nn.Parameter(distribute_tensor(v.cuda(), mesh, [Shard(0)])) for v in values]
    params.append(nn.Parameter(values[0].cuda()))
    whole = [nn.Parameter(v.clone()) for v in [*values, values[0]]]
    optimizers = [LARS(ps, lr=0.5, momentum=0.9, weight_decay=0.1) for ps in (params, whole)]
    for found in (0.0, 1.0, 0.0):
        optimizers[0].found_inf = torch.tensor(found * dist.get_rank(), device="cuda")
        for i in (0, 1, 3):
            params[i].grad, whole[i].grad = torch.ones_like(params[i]), torch.ones_like(whole[i])
        optimizers[0].step()
        if not found:
            optimizers[1].step()
        for p, q in zip(params, whole):
            got, expected = (p.to_local(), own_rows(q)) if isinstance(p, DTensor) else (p, q)
            torch.testing.assert_close(got.cpu(), expected, rtol=1e-6, atol=1e-6)


@on_ranks(2)
def test_offloaded_to_the_cpu():
    """If the process group only has a CUDA back end, as with NCCL, the message goes through the GPU."""
    mesh_of_all()
    mesh = DeviceMesh.from_group(dist.new_group(backend="cuda:gloo"), "cuda")
    reference = make_net()
    train(reference, make_optimizer(reference))
    model = fully_shard(make_net(), mesh=mesh, offload_policy=CPUOffloadPolicy(pin_memory=False))
    optimizer = make_optimizer(model)
    for x, y in batches(5):
        x, y = (t.chunk(2)[dist.get_rank()].cuda() for t in (x, y))
        (model(x) - y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    norm = torch.stack([q.detach().norm() for q in reference.parameters()]).norm()
    for p, q in zip(model.parameters(), reference.parameters()):
        assert p.to_local().device.type == "cpu"
        assert (p.to_local() - own_rows(q)).norm() <= TOLERANCE * norm


def sharded_params(mesh) -> list[tuple[str, nn.Parameter]]:
    shapes = {"a": (5, 6), "b": (8, 2), "c": (4,)}
    return [
        (name, nn.Parameter(distribute_tensor(torch.full(shape, 2.0).cuda(), mesh, [Shard(0)])))
        for name, shape in shapes.items()
    ]


def assert_step_changes(optimizer, changes: bool) -> None:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    before = [p.detach().to_local().clone() for p in params]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert [not torch.equal(p.to_local(), b) for p, b in zip(params, before)] == [changes] * len(params)


@on_ranks(2)
@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("with_found_inf", [False, True])
def test_ranks_that_differ_later(with_found_inf, foreach):
    """The step in which they differ changes nothing, without an error. The next step raises on all ranks."""
    optimizer = LARS(sharded_params(mesh_of_all()), lr=0.5, momentum=0.9, foreach=foreach)
    if with_found_inf:
        optimizer.found_inf = torch.zeros((), device="cuda")
    assert_step_changes(optimizer, True)
    for other in (0.25, 0.125):
        optimizer.param_groups[0]["lr"] = other  # on all ranks
        assert_step_changes(optimizer, True)
        assert_step_changes(optimizer, True)
        if dist.get_rank() == 1:
            optimizer.param_groups[0]["lr"] = 1.0
        assert_step_changes(optimizer, False)
        with pytest.raises(
            ValueError, match=f"rank 1 has lr=1.0 where rank 0 has {other}, in the group .*'a'"
        ):
            assert_step_changes(optimizer, False)
        optimizer.param_groups[0]["lr"] = other
        assert_step_changes(optimizer, True)


@on_ranks(2)
def test_ranks_that_differ_at_first():
    params = sharded_params(mesh_of_all())
    optimizer = LARS(params[:: -1 if dist.get_rank() == 1 else 1], lr=0.5, momentum=0.9)
    with pytest.raises(ValueError, match=r"rank 1 has 'c', .* as shared parameter 0 where rank 0 has 'a'"):
        assert_step_changes(optimizer, False)


@on_ranks(2)
def test_error_of_one_rank():
    """That rank raises at once. The other rank's step changes nothing, and its next step says why."""
    optimizer = LARS(sharded_params(mesh_of_all()), lr=0.5, momentum=0.9)
    assert_step_changes(optimizer, True)
    state = optimizer.state[optimizer.param_groups[0]["params"][1]]
    right = state["momentum_buffer"]
    text = r"momentum_buffers\[1\] has shape"
    if dist.get_rank() == 1:
        local = right.to_local()
        other = local.new_zeros(local.shape[0] + 1, *local.shape[1:])
        state["momentum_buffer"] = DTensor.from_local(
            other, right.device_mesh, right.placements, run_check=False
        )
        with pytest.raises(ValueError, match=text):
            assert_step_changes(optimizer, False)
    else:
        assert_step_changes(optimizer, False)
    state["momentum_buffer"] = right
    error = ValueError if dist.get_rank() == 1 else RuntimeError
    with pytest.raises(error, match=text):
        assert_step_changes(optimizer, False)
    assert_step_changes(optimizer, True)


@on_ranks(2)
def test_a_group_more_on_one_rank():
    optimizer = LARS(sharded_params(mesh_of_all()), lr=0.5, momentum=0.9)
    assert_step_changes(optimizer, True)
    [*_, (name, other)] = sharded_params(mesh_of_all())
    text = "this rank has other parameters than in the step before, and other ranks have not"
    if dist.get_rank() == 1:
        optimizer.add_param_group({"params": [(name, other)]})
        with pytest.raises(ValueError, match=text):
            assert_step_changes(optimizer, False)
    else:
        assert_step_changes(optimizer, False)
        optimizer.add_param_group({"params": [(name, other)]})
    error = ValueError if dist.get_rank() == 1 else RuntimeError
    with pytest.raises(error, match=text):
        assert_step_changes(optimizer, False)
    assert_step_changes(optimizer, True)
