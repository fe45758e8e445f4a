"""Every dtype, option and layout against the fp64 reference, by every implementation."""

import pytest
import torch

from layouts import LAYOUTS
from reference import Rule
from stepping import IMPLEMENTATIONS, Dtypes, check_step, make_leaf

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16

DTYPES = {
    "fp32": Dtypes(F32),
    "fp64": Dtypes(F64),
    "fp64, grad fp32": Dtypes(F64, F32),
    "fp64, momentum fp32": Dtypes(F64, F64, F32),
    "bf16": Dtypes(BF16),
    "bf16, grad fp32": Dtypes(BF16, F32),
    "bf16, momentum fp32": Dtypes(BF16, BF16, F32),
    "bf16, grad and momentum fp32": Dtypes(BF16, F32, F32),
    "bf16, master": Dtypes(BF16, BF16, F32, master=True),
    "bf16, master, grad fp32": Dtypes(BF16, F32, F32, master=True),
    "bf16, master, momentum bf16": Dtypes(BF16, BF16, BF16, master=True),
    "fp16": Dtypes(F16),
    "fp16, grad fp32": Dtypes(F16, F32),
    "fp16, momentum fp32": Dtypes(F16, F16, F32),
    "fp16, master": Dtypes(F16, F16, F32, master=True),
}

# Values with which an update is about as large as the weight, so that a wrong term shows in bf16 too.
_MOMENTUM = dict(lr=0.7, momentum=0.6, weight_decay=0.3, trust_coefficient=0.8)
_TORCH = dict(_MOMENTUM, classic_momentum=False)

OPTIONS = {
    "plain": dict(lr=0.5, trust_coefficient=0.7),
    "weight decay": dict(lr=0.5, trust_coefficient=0.7, weight_decay=0.4),
    "eps": dict(lr=0.5, trust_coefficient=0.7, eps=3.0),
    "decayed norm": dict(lr=0.5, trust_coefficient=0.7, weight_decay=0.4, decayed_norm=True),
    "decayed norm without decay": dict(lr=0.5, trust_coefficient=0.7, decayed_norm=True),
    "decayed norm, torch momentum": dict(_TORCH, weight_decay=1.5, decayed_norm=True),
    "no adaptation": dict(lr=0.3, weight_decay=0.4, layer_adaptation=False),
    "maximize": dict(lr=0.5, trust_coefficient=0.7, weight_decay=0.4, maximize=True),
    "clip that clips": dict(lr=0.3, trust_coefficient=0.7, weight_decay=0.1, trust_clip=True),
    "clip that does not": dict(lr=2.0, trust_coefficient=0.7, weight_decay=0.1, trust_clip=True),
    "clip without adaptation": dict(lr=1.5, layer_adaptation=False, trust_clip=True),
    "classic momentum": _MOMENTUM,
    "classic nesterov": dict(_MOMENTUM, nesterov=True),
    "torch momentum": _TORCH,
    "torch nesterov": dict(_TORCH, nesterov=True),
    "dampening": dict(_TORCH, dampening=0.4),
    "full dampening": dict(_TORCH, dampening=1.0),
    "dampening without momentum": dict(_TORCH, momentum=0.0, dampening=0.4),
    "momentum without adaptation": dict(_MOMENTUM, layer_adaptation=False, lr=0.2),
    "everything classic": dict(_MOMENTUM, nesterov=True, maximize=True, trust_clip=True, eps=0.5),
    "everything with a decayed norm": dict(
        _MOMENTUM, nesterov=True, maximize=True, trust_clip=True, eps=0.5, decayed_norm=True
    ),
    "everything torch": dict(_TORCH, dampening=0.2, maximize=True, trust_clip=True, eps=0.5),
}


def make_leaves(rule, dtypes, device, generator):
    return [make_leaf(name, layouts, dtypes, rule, device, generator) for name, layouts in LAYOUTS.items()]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_step(implementation, dtypes, options, device, generator):
    rule = Rule(**options, master_weights=dtypes.master)
    leaves = make_leaves(rule, dtypes, device, generator)
    check_step(implementation, leaves)
    if rule.dampening > 0:  # which leaves out the first step
        check_step(implementation, leaves)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "options",
    [OPTIONS["everything classic"], OPTIONS["dampening"], OPTIONS["everything with a decayed norm"]],
    ids=["classic", "torch", "decayed norm"],
)
@pytest.mark.parametrize("found_inf", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("dtypes", [Dtypes(F32), Dtypes(F64), Dtypes(F16, F16, F32, master=True)], ids=str)
def test_scaled_gradients(implementation, options, found_inf, dtypes, device, generator):
    leaves = make_leaves(Rule(**options, master_weights=dtypes.master), dtypes, device, generator)
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
        for master in (False, True):
            rule = Rule(**options, master_weights=master)
            of_group = [dtypes for dtypes in DTYPES.values() if dtypes.master == master]
            # fp32 and fp64 parameters are their own masters.
            of_group += [Dtypes(F32), Dtypes(F64)] if master else []
            for k, dtypes in enumerate(of_group):
                name = list(LAYOUTS)[(7 * i + k) % len(LAYOUTS)]
                leaves.append(make_leaf(name, LAYOUTS[name], dtypes, rule, device, generator))
    check_step(implementation, leaves)


@pytest.mark.parametrize("dtypes", [Dtypes(F32), Dtypes(F64), Dtypes(BF16)], ids=str)
def test_given_norms_replace_those_of_the_tensors(dtypes, device, generator):
    from stepping import call_op, same_bits

    rule = Rule(**OPTIONS["classic momentum"])
    a, b = ([make_leaf("", LAYOUTS["matrix"], dtypes, rule, device, generator)] for _ in range(2))
    for ours, other in zip(a[0].tensors().values(), b[0].tensors().values()):
        ours.copy_(other)
    # Gradients and weights twice as large as norms have it: as if each had been handed a quarter.
    norms = torch.ops.fused_lars.squared_norms([a[0].param], [a[0].grad])
    ratio = call_op(a, squared_norms=norms * torch.tensor([4.0, 1.0], dtype=torch.float64, device=device))
    expected = 2 * 0.8 * norms[0, 0].sqrt() / (norms[0, 1].sqrt() + 0.3 * 2 * norms[0, 0].sqrt())
    torch.testing.assert_close(ratio[0], expected, rtol=1e-14, atol=0)
    assert not same_bits(a[0].param, b[0].param)
