"""torch's schedulers drive LARS. Every step uses the lr (and momentum) that the group shows."""

import copy

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedulers

import reference
import torch_versions
from fused_lars import LARS
from reference import Rule

STEPS = 12


def warm_up_then_polynomial(optimizer):
    """MLPerf's schedule."""
    warm_up = schedulers.LinearLR(optimizer, start_factor=0.1, total_iters=4)
    decay = schedulers.PolynomialLR(optimizer, total_iters=STEPS - 4, power=2.0)
    return schedulers.SequentialLR(optimizer, [warm_up, decay], milestones=[4])


SCHEDULERS = {
    "LinearLR": lambda o: schedulers.LinearLR(o, start_factor=0.2, total_iters=5),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, total_iters=STEPS, power=2.0),
    "SequentialLR": warm_up_then_polynomial,
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(o, factor=0.5, total_iters=3), schedulers.ExponentialLR(o, gamma=0.8)]
    ),
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda step: 1 / (1 + step)),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: schedulers.StepLR(o, step_size=3, gamma=0.3),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, milestones=[3, 6], gamma=0.3),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, T_max=STEPS),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, T_0=5),
    "CyclicLR": lambda o: schedulers.CyclicLR(
        o, base_lr=0.1, max_lr=0.6, step_size_up=3, base_momentum=0.5, max_momentum=0.9
    ),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(
        o, max_lr=0.6, total_steps=STEPS + 1, base_momentum=0.5, max_momentum=0.9
    ),
}


def grad(step):
    return torch.linspace(-1, 2, 30, dtype=torch.float64).mul(step + 1).cos()


@pytest.mark.parametrize("classic_momentum", [True, False], ids=["classic", "torch"])
@pytest.mark.parametrize("lr", ["number", "tensor"])
@pytest.mark.parametrize("implementation", ["fused", "foreach"])
@pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS)
def test_schedule(scheduler, implementation, lr, classic_momentum, device):
    param = nn.Parameter(torch.linspace(1, 2, 30, dtype=torch.float64, device=device))
    lr = torch.tensor(0.5, dtype=torch.float64, device=device) if lr == "tensor" else 0.5
    options = dict(weight_decay=0.1, trust_coefficient=0.5, classic_momentum=classic_momentum)
    optimizer = LARS([param], lr=lr, momentum=0.9, **options, **{implementation: True})
    schedule = scheduler(optimizer)
    group = optimizer.param_groups[0]
    weight, buffer, lrs = param.detach().cpu().numpy().copy(), None, []
    for step in range(STEPS):
        lrs.append(float(group["lr"]))
        rule = Rule(lr=lrs[-1], momentum=group["momentum"], **options)
        result = reference.step(weight, grad(step).numpy(), buffer, rule)
        weight, buffer = result.weight, result.momentum_buffer
        param.grad = grad(step).to(device)
        optimizer.step()
        schedule.step()
    # A captured graph and a scheduler hold the same tensor.
    if torch_versions.SCHEDULERS_KEEP_LR_TENSORS:
        assert isinstance(lr, float) or group["lr"] is lr
    assert len(set(lrs)) > 2
    # Twelve fp64 steps, each with errors of about 2^-53 of numbers below 10.
    torch.testing.assert_close(param.detach().cpu(), torch.from_numpy(weight), rtol=1e-12, atol=1e-12)


def test_reduce_on_plateau():
    params = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = LARS([{"params": params[0]}, {"params": params[1], "lr": 0.4}], lr=0.8)
    schedule = schedulers.ReduceLROnPlateau(optimizer, factor=0.5, patience=1)
    for loss in (1.0, 0.5, 0.5, 0.5):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        schedule.step(loss)
    assert [group["lr"] for group in optimizer.param_groups] == [0.4, 0.2]


@pytest.mark.parametrize("implementation", ["fused", "foreach"])
def test_lr_tensor_written_in_place_is_read_at_the_next_step(implementation, device):
    """The value is never cached, on the parameters' device or on the CPU."""
    for where in {device, "cpu"}:
        param = nn.Parameter(torch.ones(4, device=device))
        lr = torch.tensor(0.5, device=where)
        optimizer = LARS([param], lr=lr, trust_coefficient=0.5, **{implementation: True})
        for value, expected in ((0.5, 0.75), (0.0, 0.75), (1.0, 0.375)):
            lr.fill_(value)
            param.grad = torch.ones_like(param)
            optimizer.step()
            torch.testing.assert_close(param.detach(), torch.full_like(param, expected))
        assert optimizer.param_groups[0]["lr"] is lr


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
def test_lr_tensor_of_any_floating_dtype(dtype, shape, device):
    for where in {device, "cpu"}:
        param = nn.Parameter(torch.ones(4, device=device))
        optimizer = LARS([param], lr=torch.full(shape, 0.5, dtype=dtype, device=where), trust_coefficient=0.5)
        param.grad = torch.ones_like(param)
        optimizer.step()
        torch.testing.assert_close(param.detach(), torch.full_like(param, 0.75))


def test_scheduler_state_resumes(device):
    """Optimizer and scheduler, saved and loaded during a schedule, go on as if nothing had happened."""

    def make():
        param = nn.Parameter(torch.linspace(1, 2, 30, device=device))
        optimizer = LARS([param], lr=0.5, momentum=0.9, trust_coefficient=0.5)
        return param, optimizer, warm_up_then_polynomial(optimizer)

    def train(param, optimizer, schedule, steps):
        for step in steps:
            param.grad = grad(step).to(device, torch.float32)
            optimizer.step()
            schedule.step()

    param, optimizer, schedule = run = make()
    train(*run, range(6))
    other_param, other, other_schedule = resumed = make()
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    other_schedule.load_state_dict(schedule.state_dict())
    other_param.data.copy_(param.data)
    train(*run, range(6, STEPS))
    train(*resumed, range(6, STEPS))
    assert torch.equal(param, other_param)
