"""Frameworks that replace the parameters of an existing optimizer, each in its own way."""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import distributed_nets as nets
from distributed_harness import on_ranks
from distributed_nets import make_net, make_optimizer, train
from fused_lars import LARS


def prepare_as_accelerate(model, optimizer, shard):
    """What accelerate's prepare() does to shard a model with FSDP2. HF's Trainer calls it too."""
    optimizer.load_state_dict(optimizer.state_dict())  # AcceleratedOptimizer
    old = {name: p.data_ptr() for name, p in model.named_parameters()}
    for group in optimizer.param_groups:
        for i, p in enumerate(group["params"]):
            group["params"][i] = torch.empty(1, dtype=p.dtype, device=p.device)
            group["params"][i].data_ptr = p.data_ptr()
    model, data = shard(model)
    new = dict(model.named_parameters())
    mapping = {address: new[name] for name, address in old.items()}
    for group in optimizer.param_groups:
        group["params"] = [mapping[p.data_ptr] for p in group["params"]]
    return model, data


@on_ranks(2, 4)
@pytest.mark.parametrize("layout", ["sharded", "sharded_by_layer", "hybrid"])
def test_accelerate(layout):
    reference, model = make_net(), make_net()
    optimizer = make_optimizer(model)
    original = weakref.ref(next(model.parameters()))
    model, data = prepare_as_accelerate(model, optimizer, getattr(nets, layout))
    gc.collect()
    assert original() is None  # its memory is free before the first step
    train(model, optimizer, data)
    train(reference, make_optimizer(reference))
    assert max(nets.errors(model, reference).values()) <= nets.TOLERANCE


@on_ranks(2)
def test_accelerate_after_steps():
    """Replaces parameters that were stepped before, without momentum. Nobody carries their state over."""
    reference, model = make_net(), make_net()
    optimizer = make_optimizer(model, momentum=0.0)
    train(model, optimizer, steps=3)
    model, data = prepare_as_accelerate(model, optimizer, nets.sharded)
    train(model, optimizer, data, steps=3, first=3)
    train(reference, make_optimizer(reference, momentum=0.0), steps=6)
    assert max(nets.errors(model, reference).values()) <= nets.TOLERANCE


@on_ranks(2)
def test_accelerate_and_a_compiled_step():
    reference, model = make_net(), make_net()
    optimizer = make_optimizer(model)
    model, data = prepare_as_accelerate(model, optimizer, nets.sharded)
    step = torch.compile(optimizer.step, backend="eager")
    for x, y in nets.batches(3):
        nets.loss_of(model, x, y, data).backward()
        step()
        optimizer.zero_grad()
    train(reference, make_optimizer(reference), steps=3)
    assert max(nets.errors(model, reference).values()) <= nets.TOLERANCE


@on_ranks(2)
def test_fsdp1_made_after_the_optimizer():
    """The parameters are the same objects, but views of a flat one from then on."""
    model = make_net()
    optimizer = make_optimizer(model)
    model = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    for x, y in nets.batches(1):
        nets.loss_of(model, x, y, nets.all_ranks()).backward()
    with pytest.raises(ValueError, match=r"parameter 'blocks.0.up.weight', .* flat parameter of .*FSDP1"):
        optimizer.step()
    assert not optimizer.state


@on_ranks(2)
def test_another_layout_between_steps():
    """From sharded to whole parameters and back. A step takes what the groups hold."""
    reference, (model, data) = make_net(), nets.sharded(make_net())
    optimizer = make_optimizer(model, momentum=0.0)
    train(model, optimizer, data, steps=2)
    for layout in ("replicated", "sharded_by_layer"):
        values = {name.removeprefix("module."): nets.full(p.detach()) for name, p in model.named_parameters()}
        net = make_net()
        net.load_state_dict(values)
        model, data = getattr(nets, layout)(net)
        new = {name.removeprefix("module."): p for name, p in model.named_parameters()}
        for group in optimizer.param_groups:
            group["params"] = [new[name] for name in group["param_names"]]
        train(model, optimizer, data, steps=2, first=2 if layout == "replicated" else 4)
    train(reference, make_optimizer(reference, momentum=0.0), steps=6)
    assert max(nets.errors(model, reference).values()) <= nets.TOLERANCE


# ---------------------------------------------------------------- flat tensors, which need no ranks


def flattened(params, ranks: int, rank: int = 0) -> torch.Tensor:
    """A rank's share of all elements, padded as in DeepSpeed."""
    flat = torch.cat([p.detach().reshape(-1) for p in params])
    flat = nn.functional.pad(flat, (0, -len(flat) % (2 * ranks)))
    flat = flat.chunk(ranks)[rank].clone()
    flat.requires_grad = True
    flat.grad = torch.ones_like(flat)
    return flat


def assert_refused(optimizer, match=r"param_groups\[0\]\['params'\] had \d+ .*flat.* no norm of a layer"):
    params = [p for group in optimizer.param_groups for p in group["params"]]
    before = [p.detach().clone() for p in params]
    with pytest.raises(ValueError, match=match):
        optimizer.step()
    assert all(map(torch.equal, before, params))
    assert not optimizer.state


def groups_of(optimizer_of: str, model):
    return {
        "param_groups": lambda: make_optimizer(model),
        "one_group": lambda: LARS(model.parameters(), lr=0.1, momentum=0.9),
        "group_each": lambda: LARS([{"params": [p]} for p in model.parameters() if p.ndim > 1], lr=0.1),
    }[optimizer_of]()


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 8])
@pytest.mark.parametrize("optimizer_of", ["param_groups", "one_group", "group_each"])
def test_zero_1_and_2(optimizer_of, ranks, loaded):
    """DeepSpeedZeroOptimizer, BF16_Optimizer and FP16_Optimizer have one flat tensor for each group."""
    optimizer = groups_of(optimizer_of, make_net())
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if len(group["params"]) != 0]
    for group in optimizer.param_groups:
        group["params"] = [flattened(group["params"], ranks)]
    if loaded:
        optimizer.load_state_dict(optimizer.state_dict())
    assert_refused(optimizer)
    assert_refused(optimizer)  # again, as the first time


def test_zero_takes_one_group_at_a_time():
    optimizer = make_optimizer(make_net())
    for group in optimizer.param_groups:
        group["params"] = [flattened(group["params"], ranks=2)]
    groups = optimizer.param_groups
    for index in (1, 0):
        optimizer.param_groups = [groups[index]]
        assert_refused(optimizer)


def test_zero_3():
    """Groups are empty, and hold flat tensors during a step."""
    optimizer = make_optimizer(make_net())
    flat = [[flattened(group["params"], ranks=2)] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["params"] = []
    optimizer.step()
    optimizer.param_groups[0]["params"] = flat[0]
    assert_refused(optimizer)
    flat[0][0].ds_id = "0_5"
    assert_refused(
        optimizer, r"param_groups\[0\]\['params'\]\[0\] is part of a flat one of DeepSpeed's ZeRO 3"
    )


def test_zero_3_before_the_optimizer():
    """zero.Init leaves empty parameters that have its mark."""
    model = make_net()
    for i, p in enumerate(model.parameters()):
        p.ds_id, p.data = i, torch.empty(0)
    with pytest.raises(ValueError, match=r"parameter 'blocks.0.norm.weight', .* DeepSpeed's ZeRO 3"):
        LARS(model.named_parameters(), lr=0.1)


def test_megatron():
    """DistributedOptimizer: of each parameter, the part that this rank owns."""
    optimizer = make_optimizer(make_net())
    for group in optimizer.param_groups:
        shards = [p.detach().view(-1)[: p.numel() // 2].clone() for p in group["params"][:4]]
        for shard in shards:
            shard.requires_grad, shard.grad = True, torch.ones_like(shard)
        group["params"] = shards
    assert_refused(optimizer)


# ---------------------------------------------------------------- tensors that are not flat


def test_fp32_masters_in_their_place():
    """DeepSpeed without ZeRO in fp16 or bf16, and apex, put in as many tensors of the same shapes."""
    model = make_net(torch.bfloat16)
    optimizer = make_optimizer(model)
    for group in optimizer.param_groups:
        group["params"] = [p.detach().clone().float() for p in group["params"]]
        for p in group["params"]:
            p.requires_grad, p.grad = True, torch.ones_like(p)
    reference = LARS(
        [
            {**group, "params": [p.detach().clone() for p in group["params"]]}
            for group in optimizer.param_groups
        ]
    )
    for group, other in zip(optimizer.param_groups, reference.param_groups):
        for p, q in zip(group["params"], other["params"]):
            q.grad = p.grad
    optimizer.step()
    reference.step()
    for group, other in zip(optimizer.param_groups, reference.param_groups):
        assert all(map(torch.equal, group["params"], other["params"]))


@pytest.mark.parametrize("change", ["resized", "added", "removed", "kept"])
def test_parameters_of_the_users_own(change):
    """A resized head, and parameters added to a group or removed from it by hand."""
    weights = [nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(3, 4))]
    biases = [nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(3))]
    optimizer = LARS([{"params": weights}, {"params": biases}], lr=0.1)
    weights, biases = (group["params"] for group in optimizer.param_groups)
    if change == "resized":
        weights[0], biases[:] = nn.Parameter(torch.ones(6, 3)), [nn.Parameter(torch.ones(n)) for n in (6, 3)]
    elif change == "added":
        weights.append(nn.Parameter(torch.ones(7)))
    elif change == "removed":
        del weights[0], biases[0]
    for _ in range(2):
        for p in (*weights, *biases):
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert all((p < 1.0).all() for p in (*weights, *biases))


@on_ranks(2)
def test_shapes_of_one_dimension_that_become_dtensors():
    """DTensors are not flat tensors, whatever their number of dimensions."""
    model = nn.Sequential(nn.LayerNorm(8), nn.LayerNorm(8))
    optimizer = LARS([{"params": [*model.parameters(), nn.Parameter(torch.ones(2, 2))]}], lr=0.1)
    optimizer.param_groups[0]["params"] = [*fully_shard(model).parameters()]
    model(torch.arange(16.0).view(2, 8)).square().sum().backward()
    before = [nets.full(p.detach()).clone() for p in model.parameters()]
    optimizer.step()
    assert not all(torch.equal(nets.full(p.detach()), b) for p, b in zip(model.parameters(), before))
