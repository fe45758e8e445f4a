"""Numbers at the limits of a dtype: zero norms, large and small values, every rounding of a half."""

import pytest
import torch
from torch import nn

from fused_lars import LARS
from layouts import Layout, Layouts
from reference import Rule
from stepping import Dtypes, Leaf, call_op, check_step, make_leaf, same_bits

HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}


@pytest.fixture(params=["fused", "foreach", "op"])
def implementation(request):
    return request.param


@pytest.mark.parametrize("zero", ["param", "grad", "both"])
def test_zero_norms(implementation, zero, device, generator):
    """The trust ratio is then 1. So a bias that starts at zero moves, and nothing becomes NaN."""
    rule = Rule(lr=0.1, momentum=0.9, weight_decay=0.1)
    leaf = make_leaf("w", Layouts(Layout((40,))), Dtypes(torch.float32), rule, device, generator)
    for name in ("param", "grad"):
        if zero in (name, "both"):
            getattr(leaf, name).zero_()
    before = leaf.param.clone()
    check_step(implementation, [leaf])
    assert zero == "both" or not torch.equal(leaf.param, before)


def test_zero_bias_moves_in_training(device):
    model = nn.Linear(4, 2).to(device)
    nn.init.zeros_(model.bias)
    optimizer = LARS(model.parameters(), lr=0.1)
    model(torch.ones(3, 4, device=device)).sum().backward()
    optimizer.step()
    torch.testing.assert_close(model.bias, torch.full((2,), -0.3, device=device))


def test_fp16_norms_do_not_overflow(implementation, device, generator):
    """300 squared is more than fp16 holds. So is the sum of 5,000 squares of 30."""
    rule = Rule(lr=0.5, trust_coefficient=0.5, momentum=0.5)
    leaf = make_leaf("w", Layouts(Layout((5000,))), Dtypes(torch.float16), rule, device, generator)
    leaf.param.fill_(30.0)
    leaf.grad.fill_(-300.0)
    leaf.momentum_buffer.zero_()
    before = leaf.param.clone()
    check_step(implementation, [leaf])
    assert leaf.param.isfinite().all()
    assert not torch.equal(leaf.param, before)


@pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)
@pytest.mark.parametrize("exponent", [-30, -15, 15, 30])
def test_norms_of_large_and_small_numbers(implementation, dtype, exponent, device, generator):
    """fp32 holds squares of 2^±60. Only the ratio of the norms matters."""
    rule = Rule(lr=0.5, trust_coefficient=0.5, weight_decay=0.1)
    dtypes = Dtypes(dtype, torch.float32)
    leaf = make_leaf("w", Layouts(Layout((300,))), dtypes, rule, device, generator)
    leaf.grad.mul_(2.0**exponent)
    check_step(implementation, [leaf])


@pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)
@pytest.mark.parametrize("lr", [0.0, 1.0])
def test_half_parameters_are_updated(implementation, dtype, lr, device, generator):
    """With lr = 0 their bits do not change, whatever the momentum buffer holds."""
    rule = Rule(lr=lr, trust_coefficient=0.2, momentum=0.9, trust_clip=True, classic_momentum=False)
    leaf = make_leaf("w", Layouts(Layout((600,))), Dtypes(dtype), rule, device, generator)
    before = leaf.param.clone()
    check_step(implementation, [leaf])
    changed = (leaf.param != before).float().mean().item()
    assert changed == 0 if lr == 0 else changed > 0.9


@pytest.mark.parametrize("lr", [0.0, 0.4])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_larc_clip_divides_by_no_zero(implementation, lr, clip, tensor_lr, device, generator):
    rule = Rule(lr=lr, trust_coefficient=0.6, momentum=0.5, trust_clip=clip)
    leaf = make_leaf("w", Layouts(Layout((50,))), Dtypes(torch.float32), rule, device, generator)
    leaf.momentum_buffer.zero_()
    before = leaf.param.clone()
    check_step(implementation, [leaf], tensor_lr=tensor_lr)
    assert torch.equal(leaf.param, before) == (lr == 0)
    assert leaf.param.isfinite().all()
    assert leaf.momentum_buffer.isfinite().all()


def rounding_cases(dtype: torch.dtype) -> torch.Tensor:
    """Every finite number of a half dtype, the midpoints between them, and their neighbours in fp32."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[every.isfinite()].float().sort().values
    half_way = every[:-1] / 2 + every[1:] / 2
    up, down = torch.tensor(torch.inf), torch.tensor(-torch.inf)
    largest = torch.tensor([65519.996, 65520.0, 65536.0, 3.3961775e38, 3.4028235e38, 1e-45, 0.0, -0.0])
    return torch.cat([every, half_way, half_way.nextafter(up), half_way.nextafter(down), largest, -largest])


@pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)
@pytest.mark.parametrize("op", ["step_", "reference_step_"])
def test_every_rounding_of_a_master(dtype, op, device):
    """A step with lr = 0 only rounds the master to its parameter."""
    master = rounding_cases(dtype).to(device)
    rule = Rule(lr=0.0, layer_adaptation=False, master_weights=True)
    param, grad = torch.zeros_like(master, dtype=dtype), torch.zeros_like(master, dtype=dtype)
    leaf = Leaf("w", rule, param, grad, master_param=master.clone())
    call_op([leaf], op=op)
    # w - 0 is w, but a zero loses its sign: -0 - -0 is 0.
    assert torch.equal(leaf.master_param, master)
    expected = master.to(dtype)
    wrong = (leaf.param != expected).nonzero().reshape(-1)
    assert wrong.numel() == 0, f"{master[wrong[:5]].tolist()} became {leaf.param[wrong[:5]].tolist()}"


@pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)
@pytest.mark.parametrize("op", ["step_", "reference_step_"])
def test_every_half_is_read_right(dtype, op, device):
    """Subtracts every finite number of the dtype, as a gradient, from an fp32 master of zeros."""
    grad = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    grad = grad[grad.isfinite()].to(device)
    rule = Rule(lr=1.0, layer_adaptation=False, master_weights=True)
    leaf = Leaf(
        "w", rule, torch.zeros_like(grad), grad, master_param=torch.zeros_like(grad, dtype=torch.float32)
    )
    call_op([leaf], op=op)
    assert torch.equal(leaf.master_param, -grad.float())
    assert torch.equal(leaf.param, -grad)


def test_scaling_the_gradient_does_not_change_the_step(implementation, device, generator):
    """Without decay and eps, only the gradient's direction matters. Powers of two are exact."""
    rule = Rule(lr=0.5, trust_coefficient=0.1)
    leaves = []
    for exponent in (0, -40, -3, 20, 40):
        leaf = make_leaf(
            f"2^{exponent}",
            Layouts(Layout((70,))),
            Dtypes(torch.float32),
            rule,
            device,
            torch.Generator().manual_seed(3),
        )
        leaf.grad.mul_(2.0**exponent)
        leaves.append(leaf)
    check_step(implementation, leaves)
    for leaf in leaves[1:]:
        assert same_bits(leaf.param, leaves[0].param), leaf.name
