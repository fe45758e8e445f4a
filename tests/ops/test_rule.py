"""Every dtype, option and layout against the fp64 reference, with every implementation."""

import pytest
import torch

from cases import BF16, DTYPES, F16, F32, F64, FEW_OPTIONS, INT8, OPTIONS, ROUNDED_DTYPES
from layouts import LAYOUTS
from reference import Rule
from stepping import IMPLEMENTATIONS, Dtypes, call_op, check_step, make_leaf, same_bits


def make_leaves(rule, dtypes, device, generator):
    return [make_leaf(name, layouts, dtypes, rule, device, generator) for name, layouts in LAYOUTS.items()]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_step(implementation, dtypes, options, device, generator):
    check_steps(implementation, dtypes, options, device, generator)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtypes", ROUNDED_DTYPES.values(), ids=ROUNDED_DTYPES)
@pytest.mark.parametrize("name", FEW_OPTIONS)
def test_step_with_stochastic_rounding(implementation, dtypes, name, device, generator):
    check_steps(implementation, dtypes, OPTIONS[name], device, generator)


def check_steps(implementation, dtypes, options, device, generator):
    rule = Rule(**options, **dtypes.switches)
    leaves = make_leaves(rule, dtypes, device, generator)
    check_step(implementation, leaves)
    if rule.dampening > 0:  # dampening does not apply to the first step
        check_step(implementation, leaves)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "options",
    [OPTIONS["everything classic"], OPTIONS["dampening"], OPTIONS["everything with a decayed norm"]],
    ids=["classic", "torch", "decayed norm"],
)
@pytest.mark.parametrize("found_inf", [0.0, 1.0, 2.0])
@pytest.mark.parametrize(
    "dtypes",
    [
        Dtypes(F32),
        Dtypes(F64),
        Dtypes(F16, F16, F32, master=True),
        Dtypes(F32, F32, INT8),
        Dtypes(F16, stochastic=True),
    ],
    ids=str,
)
def test_scaled_gradients(implementation, options, found_inf, dtypes, device, generator):
    leaves = make_leaves(Rule(**options, **dtypes.switches), dtypes, device, generator)
    for leaf in leaves:
        leaf.grad.copy_(leaf.grad.clone() * 512) if min(leaf.grad.stride(), default=1) > 0 else None
    scale, found = torch.tensor(512.0, device=device), torch.tensor(found_inf, device=device)
    check_step(implementation, leaves, grad_scale=scale, found_inf=found)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_tensor_lr(implementation, options, device, generator):
    leaves = make_leaves(Rule(**options), Dtypes(F32), device, generator)
    check_step(implementation, leaves, tensor_lr=True)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_all_groups_and_dtypes_in_one_call(implementation, device, generator):
    leaves = []
    for i, options in enumerate(OPTIONS.values()):
        for switches in ({}, {"master_weights": True}, {"stochastic_rounding": True}):
            rule = Rule(**options, **switches)
            every = [*DTYPES.values(), *ROUNDED_DTYPES.values()]
            of_group = [dtypes for dtypes in every if Rule(**options, **dtypes.switches) == rule]
            # fp32 and fp64 parameters are their own masters and are not rounded.
            of_group += [Dtypes(F32), Dtypes(F64)] if switches else []
            for k, dtypes in enumerate(of_group):
                name = list(LAYOUTS)[(7 * i + k) % len(LAYOUTS)]
                leaves.append(make_leaf(name, LAYOUTS[name], dtypes, rule, device, generator))
    check_step(implementation, leaves)


@pytest.mark.parametrize("dtypes", [Dtypes(F32), Dtypes(F64), Dtypes(BF16)], ids=str)
def test_given_norms_replace_those_of_the_tensors(dtypes, device, generator):
    rule = Rule(**OPTIONS["classic momentum"])
    a, b = ([make_leaf("", LAYOUTS["matrix"], dtypes, rule, device, generator)] for _ in range(2))
    for ours, other in zip(a[0].tensors().values(), b[0].tensors().values()):
        ours.copy_(other)
    # The given norm of the weight is twice the true one, so a step that ignores it shows.
    norms = torch.ops.fused_lars.squared_norms([a[0].param], [a[0].grad])
    ratio = call_op(a, squared_norms=norms * torch.tensor([4.0, 1.0], dtype=torch.float64, device=device))
    expected = 2 * 0.8 * norms[0, 0].sqrt() / (norms[0, 1].sqrt() + 0.3 * 2 * norms[0, 0].sqrt())
    torch.testing.assert_close(ratio[0], expected, rtol=1e-14, atol=0)
    assert not same_bits(a[0].param, b[0].param)
