"""decayed_norm: the ratio divides by |g' + weight_decay * w|. test_rule.py tests it with all settings."""

import math

import numpy as np
import pytest
import torch

import bounds
import reference
from layouts import Layout, Layouts
from reference import Rule
from stepping import Dtypes, Leaf, call_op_for_norms, make_leaf, same_bits, to_numpy

OPS = ["step_", "reference_step_"]
F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
RULE = Rule(lr=0.5, weight_decay=0.1, trust_coefficient=0.02, decayed_norm=True)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtypes", [Dtypes(F32), Dtypes(F64), Dtypes(BF16, F32), Dtypes(BF16)], ids=str)
@pytest.mark.parametrize("distance", [1e-1, 1e-3, 1e-5, 1e-7])
def test_near_a_stationary_point(op, dtypes, distance, device, generator):
    """g is nearly -weight_decay * w. Sums of w * w, g * g and w * g would be off by 1e-8 / distance^2.

    The norm is that of the vector that the update scales, with one rounding of its terms: 2 u / distance.
    """
    leaf = make_leaf("w", Layouts(Layout((5000,))), dtypes, RULE, device, generator)
    noise = torch.randn(5000, generator=generator, dtype=F64)
    grad = -RULE.weight_decay * (leaf.param.cpu().to(F64) + distance * noise)
    leaf.grad.copy_(grad.to(leaf.grad.dtype))
    w, g = to_numpy(leaf.param), to_numpy(leaf.grad)
    expected = reference.norms(w, g, RULE)
    _, norms = call_op_for_norms([leaf], op=op)
    error = bounds.SLACK * bounds.grad_norm_error(dtypes.param, leaf.grad.dtype, 5000, expected.terms)
    if dtypes.param == F32 and distance >= 1e-5:
        assert error < 0.05  # the bound leaves some digits
    assert abs(norms[0, 1].item() - expected.grad) <= error * expected.grad


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [F32, F64])
def test_exactly_at_a_stationary_point(op, dtype, device):
    """The norm is 0, so the ratio is 1 and nothing moves."""
    weight = torch.full((4099,), 0.5, dtype=dtype, device=device)
    rule = Rule(lr=0.5, weight_decay=0.25, trust_coefficient=0.02, decayed_norm=True)
    leaf = Leaf("w", rule, weight, torch.full_like(weight, -0.125))
    ratios, norms = call_op_for_norms([leaf], op=op)
    assert ratios.item() == 1.0
    assert norms[0, 1].item() == 0.0
    assert bool((weight == 0.5).all())


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("maximize", [False, True])
def test_zeros(op, maximize, device):
    """A zero gradient gives trust_coefficient / weight_decay. A zero weight without decay gives 1."""
    ones, zeros = torch.ones(5000, device=device), torch.zeros(5000, device=device)
    rule = Rule(weight_decay=0.1, trust_coefficient=0.02, decayed_norm=True, maximize=maximize)
    without = Rule(trust_coefficient=0.02, decayed_norm=True, maximize=maximize)
    leaves = [
        Leaf("zero gradient", rule, ones.clone(), zeros.clone()),
        Leaf("zero weight", rule, zeros.clone(), ones.clone()),
        Leaf("both", rule, zeros.clone(), zeros.clone()),
        Leaf("zero gradient, no decay", without, ones.clone(), zeros.clone()),
    ]
    ratios, _ = call_op_for_norms(leaves, op=op)
    torch.testing.assert_close(ratios[0].item(), 0.02 / 0.1, rtol=1e-6, atol=0)
    assert ratios[1:].tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtypes", [Dtypes(F32), Dtypes(F64), Dtypes(BF16, BF16, F32, master=True)], ids=str)
def test_without_decay_both_norms_are_one(op, dtypes, device, generator):
    leaves = []
    for decayed_norm in (False, True):
        rule = Rule(lr=0.5, momentum=0.9, decayed_norm=decayed_norm, master_weights=dtypes.master)
        leaves.append(
            make_leaf("w", Layouts(Layout((9001,))), dtypes, rule, device, generator.manual_seed(1))
        )
    ratios, norms = call_op_for_norms(leaves, op=op)
    assert same_bits(ratios[0], ratios[1])
    assert same_bits(norms[0], norms[1])
    for a, b in zip(leaves[0].tensors().values(), leaves[1].tensors().values()):
        assert same_bits(a, b)


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("numel", [40, 9000])
@pytest.mark.parametrize("scale", [1.0, 2.0**-16, 2.0**16])
def test_at_every_decade(dtype, numel, scale, device):
    """Squares of these numbers leave the type: they are subnormal or overflow."""
    low, high = (-44, 38) if dtype == F32 else (-300, 300)
    values = np.linspace(1.0, 2.0, numel)
    leaves = []
    for decade in range(low, high, 3 if dtype == F32 else 25):
        weight = torch.from_numpy(values * float(f"1e{decade}")).to(dtype)
        leaves.append(Leaf(f"1e{decade}", RULE, weight.to(device), weight.flip(0).to(device)))
    before = [(to_numpy(leaf.param).copy(), to_numpy(leaf.grad)) for leaf in leaves]
    grad_scale = torch.tensor(scale, device=device)
    _, norms = call_op_for_norms(leaves, grad_scale=grad_scale)
    for leaf, (w, g), norm in zip(leaves, before, norms.tolist()):
        expected = reference.norms(w, g, RULE, scale)
        error = bounds.SLACK * bounds.grad_norm_error(dtype, dtype, numel, expected.terms)
        assert math.isclose(norm[1], expected.grad, rel_tol=error), leaf.name


@pytest.mark.parametrize("op", OPS)
def test_special_numbers(op, device):
    """inf and NaN in either tensor show in the norm, and the ratio is 1."""
    ones = torch.ones(5000, device=device)
    for value in (torch.nan, torch.inf):
        special = ones.clone()
        special[4500] = value
        leaves = [
            Leaf("weight", RULE, special.clone(), ones.clone()),
            Leaf("grad", RULE, ones.clone(), special.clone()),
        ]
        _, norms = call_op_for_norms(leaves, op=op)
        assert not norms[:, 1].isfinite().any()
        assert norms[1, 0].isfinite()


def test_given_norms_are_of_the_decayed_gradient(device, generator):
    """The norms op gives the norms that the step takes, for several groups and with a scale."""
    layouts = Layouts(Layout((5001,)))
    rules = [RULE, Rule(weight_decay=0.3), Rule(weight_decay=0.7, maximize=True, decayed_norm=True)]
    leaves = [make_leaf("w", layouts, Dtypes(F32), rule, device, generator) for rule in rules]
    grad_scale = torch.tensor(64.0, device=device)
    params, grads = [leaf.param.clone() for leaf in leaves], [leaf.grad for leaf in leaves]
    squared = torch.ops.fused_lars.squared_norms.groups(
        params,
        grads,
        [1, 1, 1],
        weight_decay=[rule.weight_decay for rule in rules],
        maximize=[rule.maximize for rule in rules],
        decayed_norm=[rule.decayed_norm for rule in rules],
        grad_scale=grad_scale,
        workspace=torch.zeros(0, dtype=torch.int32, device=device),
    )
    twins = [Leaf(leaf.name, leaf.rule, *tensors) for leaf, *tensors in zip(leaves, params, grads)]
    taken, norms = call_op_for_norms(leaves, grad_scale=grad_scale)
    given, same_norms = call_op_for_norms(twins, grad_scale=grad_scale, squared_norms=squared)
    torch.testing.assert_close(given, taken, rtol=1e-14, atol=0)
    torch.testing.assert_close(same_norms, norms, rtol=1e-14, atol=0)
