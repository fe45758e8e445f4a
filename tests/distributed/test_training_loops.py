"""Training loops: accumulation, clipping, ZeRO, steps in backward, schedulers, options, precision."""

import pytest
import torch
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer, _apply_optimizer_in_backward
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LinearLR, PolynomialLR, SequentialLR

import distributed_nets as nets
import torch_versions
from distributed_harness import on_ranks
from distributed_nets import batches, full, loss_of, make_net, make_optimizer, train
from fused_lars import LARS

OPTIONS = {"lr": 1.0, "momentum": 0.9, "weight_decay": 1e-2, "trust_coefficient": 0.02}


@on_ranks(2, 4)
def test_zero_redundancy_optimizer():
    """Whole parameters are divided among ranks, so this is DDP's step, to the bit."""
    results = []
    for wrap in (
        LARS,
        lambda params, **options: ZeroRedundancyOptimizer(params, optimizer_class=LARS, **options),
    ):
        model, data = nets.replicated(make_net())
        train(model, wrap(model.parameters(), **OPTIONS), data)
        results.append([p.detach().clone() for p in model.parameters()])
    assert all(map(torch.equal, *results))


@on_ranks(2)
@pytest.mark.parametrize("layout", ["replicated", "sharded"])
def test_accumulation(layout):
    """Two batches in a step. The gradients of the first are not sent."""
    reference, (model, data) = make_net(), getattr(nets, layout)(make_net())
    optimizers = make_optimizer(reference), make_optimizer(model)
    for i, (x, y) in enumerate(batches(20)):
        last = i % 2 == 1
        loss_of(reference, x, y).backward()
        if layout == "sharded":
            model.set_requires_gradient_sync(last)
            loss_of(model, x, y, data).backward()
        else:
            model.require_backward_grad_sync = last  # what no_sync sets
            loss_of(model, x, y, data).backward()
        if last:
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    assert max(nets.errors(model, reference).values()) <= nets.TOLERANCE


@on_ranks(2, 4)
@pytest.mark.parametrize("layout", ["replicated", "sharded", "hybrid", "tensor_parallel"])
def test_clipping(layout):
    """Follows docs/distributed.md for Partial gradients if torch does not clip them."""
    reference, (model, data) = make_net(), getattr(nets, layout)(make_net())
    optimizers = make_optimizer(reference), make_optimizer(model)
    for x, y in batches(10):
        loss_of(reference, x, y).backward()
        loss_of(model, x, y, data).backward()
        if not torch_versions.CLIPS_PARTIAL_GRADIENTS:
            for p in model.parameters():
                if isinstance(p.grad, DTensor):
                    p.grad = p.grad.redistribute(placements=p.placements)
        for net, optimizer in zip((reference, model), optimizers):
            torch.nn.utils.clip_grad_norm_(net.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
    assert max(nets.errors(model, reference).values()) <= nets.TOLERANCE


@on_ranks(2, 4)
def test_steps_in_backward():
    """Each parameter has its own optimizer, which steps as soon as the gradient is there."""
    reference = make_net()
    train(reference, LARS(reference.parameters(), **OPTIONS))
    net, data = nets.tensor_parallel(make_net())
    _apply_optimizer_in_backward(LARS, net.parameters(), OPTIONS)
    for x, y in batches(10):
        loss_of(net, x, y, data).backward()
        assert all(p.grad is None for p in net.parameters())
    assert max(nets.errors(net, reference).values()) <= nets.TOLERANCE


@on_ranks(2, 4)
def test_steps_in_backward_of_fully_shard():
    reference = make_net()
    train(reference, LARS(reference.parameters(), **OPTIONS))
    model, data = nets.sharded_by_layer(make_net())

    def step(p, optimizers={}):  # noqa: B006  one for each parameter, kept
        optimizer = optimizers.setdefault(p, None) or LARS([p], **OPTIONS)
        optimizers[p] = optimizer
        optimizer.step()
        p.grad = None

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step)
    for x, y in batches(10):
        loss_of(model, x, y, data).backward()
    assert max(nets.errors(model, reference).values()) <= nets.TOLERANCE


def schedule(optimizer):
    warm_up = LinearLR(optimizer, start_factor=0.1, total_iters=4)
    return SequentialLR(optimizer, [warm_up, PolynomialLR(optimizer, total_iters=8, power=2)], milestones=[4])


@pytest.mark.skipif(
    not torch_versions.SEQUENTIAL_LR_TAKES_TENSORS,
    reason="SequentialLR of this torch goes wrong with a tensor",
)
@on_ranks(2)
@pytest.mark.parametrize("layout", ["replicated", "sharded"])
def test_tensor_lr_with_schedulers(layout):
    reference, (model, data) = make_net(), getattr(nets, layout)(make_net())
    for net, part in ((reference, (0, 1)), (model, data)):
        optimizer = make_optimizer(net, lr=torch.tensor(1.0) if net is model else 1.0)
        scheduler = schedule(optimizer)
        for step in range(12):
            train(net, optimizer, part, steps=1, first=step)
            scheduler.step()
    assert max(nets.errors(model, reference).values()) <= nets.TOLERANCE


@on_ranks(2)
@pytest.mark.parametrize("options", [
    {"momentum": 0.0}, {"nesterov": True}, {"trust_clip": True}, {"maximize": True},
    {"classic_momentum": False, "dampening": 0.5}, {"foreach": True}, {"fused": True}, {"eps": 0.1},
    {"decayed_norm": True}, {"decayed_norm": True, "maximize": True, "foreach": True},
], ids=str)  # fmt: skip
def test_options(options):
    reference, (model, data) = make_net(), nets.sharded(make_net())
    train(reference, make_optimizer(reference, **options))
    train(model, make_optimizer(model, **options), data)
    assert max(nets.errors(model, reference).values()) <= nets.TOLERANCE


@on_ranks(2, 4)
@pytest.mark.parametrize("master_weights", [False, True])
@pytest.mark.parametrize("reduce_dtype", [None, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mixed_precision(dtype, reduce_dtype, master_weights):
    """Equals one process's step with the same gradients: bf16 sums, or fp32 sums of bf16 values."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=reduce_dtype)
    reference, model = make_net(dtype), fully_shard(make_net(dtype), mesh=nets.mesh_1d(), mp_policy=policy)
    optimizers = [make_optimizer(net, master_weights=master_weights) for net in (reference, model)]
    for x, y in batches(10):
        loss_of(model, x.bfloat16(), y.bfloat16(), nets.all_ranks()).backward()
        for p, q in zip(model.parameters(), reference.parameters()):
            q.grad = full(p.grad)
        for optimizer in optimizers:
            optimizer.step()
    # If norms differ in the last place, a rounded weight can differ by one in its last place.
    assert max(nets.errors(model, reference).values()) <= (
        nets.TOLERANCE if dtype == torch.float32 else 2**-8
    )
    if dtype == torch.bfloat16 and master_weights:
        for p, q in zip(model.parameters(), reference.parameters()):
            master, expected = (o.state[t]["master_param"] for o, t in zip(optimizers, (q, p)))
            torch.testing.assert_close(full(expected), master, rtol=1e-5, atol=1e-6)
            assert torch.equal(full(p.detach()), full(expected).bfloat16())


@on_ranks(2)
def test_cpu_offload():
    reference = make_net()
    model = fully_shard(make_net(), mesh=nets.mesh_1d(), offload_policy=CPUOffloadPolicy(pin_memory=False))
    train(reference, make_optimizer(reference))
    train(model, make_optimizer(model), nets.all_ranks())
    assert max(nets.errors(model, reference).values()) <= nets.TOLERANCE


@on_ranks(2, 4)
def test_trust_ratios_and_norms():
    """Sharded parameters have the values of whole layers, on every rank."""
    reference, (model, data) = make_net(), nets.sharded(make_net())
    optimizers = make_optimizer(reference), make_optimizer(model)
    train(reference, optimizers[0], steps=3)
    train(model, optimizers[1], data, steps=3)
    expected, ratios = (optimizer.trust_ratios() for optimizer in optimizers)
    assert set(ratios) == set(model.parameters())
    for p, q in zip(model.parameters(), reference.parameters()):
        torch.testing.assert_close(ratios[p], expected[q], rtol=1e-6, atol=0.0)
        assert not isinstance(ratios[p], type(p))
    expected, norms = (optimizer.layer_norms() for optimizer in optimizers)
    for p, q in zip(model.parameters(), reference.parameters()):
        torch.testing.assert_close(norms[p], expected[q], rtol=1e-6, atol=0.0)


@on_ranks(2)
def test_version_counters():
    """Autograd must notice that a weight it has saved was changed, as with any optimizer."""
    model, data = nets.tensor_parallel(make_net())
    optimizer = make_optimizer(model)
    x, y = next(batches(1))
    loss = loss_of(model, x, y, data)
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@on_ranks(2)
def test_compiled_step():
    """torch.compile leaves a DTensor step to eager mode."""
    reference, (model, data) = make_net(), nets.sharded(make_net())
    train(reference, make_optimizer(reference), steps=3)
    optimizer = make_optimizer(model)
    step = torch.compile(optimizer.step, backend="eager")
    for x, y in batches(3):
        loss_of(model, x, y, data).backward()
        step()
        optimizer.zero_grad()
    assert max(nets.errors(model, reference).values()) <= nets.TOLERANCE
