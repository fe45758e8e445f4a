"""Parameter groups: each has its own options. Sharing a group, a list or a call changes no bit."""

import dataclasses
import random

import pytest
import torch
from torch import nn

from fused_lars import LARS
from layouts import LAYOUTS
from reference import Rule
from stepping import Dtypes, Leaf, call_op, check_step, make_leaf, same_bits

IMPLEMENTATIONS = ["fused", "foreach", "op"]


def copy_leaf(leaf: Leaf) -> Leaf:
    return dataclasses.replace(
        leaf, **{name: tensor.detach().clone() for name, tensor in leaf.tensors().items()}
    )


def assert_same_leaves(leaves, others):
    for leaf, other in zip(leaves, others):
        for name, tensor in leaf.tensors().items():
            assert same_bits(tensor, other.tensors()[name]), f"{name} of {leaf.name}"


@pytest.fixture
def leaves(device, generator):
    rule = Rule(lr=0.5, momentum=0.6, weight_decay=0.3, trust_coefficient=0.7)
    return [
        make_leaf(name, layouts, Dtypes(torch.float32), rule, device, generator)
        for name, layouts in LAYOUTS.items()
    ]


def test_splitting_groups_changes_no_bit(leaves):
    others = [copy_leaf(leaf) for leaf in leaves]
    for leaf in others:
        leaf.rule = dataclasses.replace(leaf.rule)  # an equal rule, but a separate group
    alone = [copy_leaf(leaf) for leaf in leaves]
    call_op(leaves)
    call_op(others)
    for leaf in alone:
        call_op([leaf])
    assert_same_leaves(leaves, others)
    assert_same_leaves(leaves, alone)


def test_order_changes_no_bit(leaves):
    others = [copy_leaf(leaf) for leaf in leaves]
    shuffled = list(others)
    random.Random(0).shuffle(shuffled)
    call_op(leaves)
    call_op(shuffled)
    assert_same_leaves(leaves, others)


@pytest.mark.parametrize("where", [0, 1, 2, 3])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_size_0_anywhere_in_the_list(implementation, where, device, generator):
    """apex drops the pending launch if the last tensor is empty."""
    rule = Rule(lr=0.5, momentum=0.6, trust_coefficient=0.7)
    names = ["matrix", "tiles", "one element"]
    names[where:where] = ["size 0", "size 0 in a dimension"]
    leaves = [
        make_leaf(name, LAYOUTS[name], Dtypes(torch.float32), rule, device, generator) for name in names
    ]
    before = [leaf.param.clone() for leaf in leaves]
    check_step(implementation, leaves)
    for leaf, old in zip(leaves, before):
        assert leaf.param.numel() == 0 or not torch.equal(leaf.param, old)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nothing_but_size_0(implementation, device, generator):
    rule = Rule(lr=0.5, momentum=0.6)
    leaves = [
        make_leaf("size 0", LAYOUTS["size 0"], Dtypes(torch.float32), rule, device, generator)
        for _ in range(2)
    ]
    check_step(implementation, leaves)


def test_465_groups(device):
    """rf-detr has a group for each parameter. They give the bits of one group."""
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(1 + i % 7, generator=generator).to(device) for i in range(465)]
    together, apart = ([nn.Parameter(x.clone()) for x in values] for _ in range(2))
    options = dict(lr=0.5, momentum=0.9, weight_decay=0.1, trust_coefficient=0.5)
    optimizers = LARS(together, **options), LARS([{"params": [p]} for p in apart], **options)
    for _ in range(2):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                for p in group["params"]:
                    p.grad = torch.sin(p.detach())
            optimizer.step()
    for p, q, old in zip(together, apart, values):
        assert same_bits(p, q)
        assert not torch.equal(p, old)


def test_every_option_can_be_a_groups_own(device):
    """A group's override gives the same bits as the constructor's argument."""
    overrides = [
        dict(lr=0.25),
        dict(momentum=0.0),
        dict(weight_decay=0.5),
        dict(trust_coefficient=0.9),
        dict(eps=2.0),
        dict(classic_momentum=False, dampening=0.5),
        dict(nesterov=True),
        dict(maximize=True),
        dict(trust_clip=True),
        dict(layer_adaptation=False),
        dict(layer_adaptation="decayed", weight_decay=0.0),
        dict(classic_momentum=False),
        dict(foreach=True),
        dict(fused=True),
        dict(capturable=True),
        dict(lr=torch.tensor(0.25)),
    ]
    base = dict(lr=0.5, momentum=0.9, weight_decay=0.1, trust_coefficient=0.5)

    def make():
        return nn.Parameter(torch.linspace(-1, 2, 40, device=device))

    def train(optimizer):
        for step in range(3):
            for group in optimizer.param_groups:
                for p in group["params"]:
                    p.grad = torch.cos(p.detach() * (step + 1))
            optimizer.step()
            for group in optimizer.param_groups:
                # At a constant lr the two momentum conventions are the same.
                group["lr"] = group["lr"] * 0.75

    grouped = [make() for _ in overrides]
    train(LARS([{"params": p, **override} for p, override in zip(grouped, overrides)], **base))
    unchanged = make()
    train(LARS([unchanged], **base))
    for p, override in zip(grouped, overrides):
        expected = make()
        train(LARS([expected], **{**base, **override}))
        assert same_bits(p, expected), override
        if not {"foreach", "fused", "capturable"} & override.keys():
            assert not torch.equal(p, unchanged), override


@pytest.mark.parametrize("trust_clip", [False, True])
@pytest.mark.parametrize("implementation", ["fused", "foreach"])
def test_adaptation_of_what_is_decayed(implementation, trust_clip, device):
    """ "decayed" is True if a group has weight decay. Otherwise the step has no adaptation and no clip."""

    def train(layer_adaptation, trust_clips):
        params = [nn.Parameter(torch.linspace(1, 2, 30, device=device)) for _ in range(3)]
        groups = [
            {"params": p, "weight_decay": d, "layer_adaptation": a, "trust_clip": c}
            for p, d, a, c in zip(params, (0.1, 0.0, 0.1), layer_adaptation, trust_clips)
        ]
        optimizer = LARS(groups, lr=2.0, momentum=0.5, trust_coefficient=0.7, **{implementation: True})
        for step in range(4):
            # A schedule may switch off the decay. That switches off the adaptation too.
            optimizer.param_groups[2]["weight_decay"] = 0.1 if step < 2 else 0.0
            if layer_adaptation[2] != "decayed":
                optimizer.param_groups[2].update(
                    layer_adaptation=step < 2, trust_clip=trust_clip and step < 2
                )
            for p in params:
                p.grad = torch.cos(p.detach() * (step + 1))
            optimizer.step()
        assert [group["layer_adaptation"] for group in optimizer.param_groups][:2] == layer_adaptation[:2]
        return params

    got = train(["decayed"] * 3, [trust_clip] * 3)
    expected = train([True, False, True], [trust_clip, False, trust_clip])
    for p, q in zip(got, expected):
        assert same_bits(p, q)


def test_masters_of_one_group_only(device):
    params = [nn.Parameter(torch.linspace(1, 2, 50, dtype=torch.bfloat16, device=device)) for _ in range(2)]
    optimizer = LARS(
        [{"params": params[0], "master_weights": True}, {"params": params[1]}], lr=1.0, trust_coefficient=1e-4
    )
    for _ in range(10):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
    # Ten updates of 1e-4 of the weight. bf16 alone rounds each of them away, but the master adds them up.
    assert list(optimizer.state[params[0]]) == ["master_param"]
    assert params[1] not in optimizer.state
    start = torch.linspace(1, 2, 50, dtype=torch.bfloat16, device=device)
    assert torch.equal(params[1], start)
    master = optimizer.state[params[0]]["master_param"]
    assert (master < start.float()).all()
    assert same_bits(params[0], master.bfloat16())


@pytest.mark.parametrize("dampening", [0.0, 0.4])
@pytest.mark.parametrize("implementation", ["fused", "foreach"])
def test_a_first_gradient_that_comes_later(implementation, dampening, device):
    """torch's fused SGD fails here. Each parameter has its own first step."""
    options = dict(lr=0.5, momentum=0.9, dampening=dampening, classic_momentum=False, trust_coefficient=0.5)
    options[implementation] = True
    values = torch.linspace(-1, 2, 40, device=device), torch.linspace(1, 3, 10, device=device)
    early, late = (nn.Parameter(x.clone()) for x in values)
    optimizer = LARS([early, late], **options)
    for step in range(4):
        early.grad = torch.sin(early.detach() + step)
        if step >= 2:
            late.grad = torch.cos(late.detach() + step)
        optimizer.step()
    for p, x, f, steps in (
        (early, values[0], torch.sin, range(4)),
        (late, values[1], torch.cos, range(2, 4)),
    ):
        alone = nn.Parameter(x.clone())
        expected = LARS([alone], **options)
        for step in steps:
            alone.grad = f(alone.detach() + step)
            expected.step()
        assert same_bits(p, alone)


@pytest.mark.parametrize("implementation", ["fused", "foreach"])
def test_parameters_without_a_gradient_are_left_alone(implementation, device):
    params = [nn.Parameter(torch.ones(4, device=device)) for _ in range(3)]
    optimizer = LARS(params, lr=0.5, momentum=0.9, **{implementation: True})
    optimizer.step()  # no parameter has a gradient
    assert not optimizer.state
    assert not optimizer.trust_ratios()
    params[1].grad = torch.ones_like(params[1])
    optimizer.step()
    params[1].grad, params[2].grad = None, torch.ones_like(params[2])
    optimizer.step()
    assert params[0].eq(1).all()
    assert params[0] not in optimizer.state
    assert same_bits(params[1], params[2])
    assert list(optimizer.trust_ratios()) == [params[2]]


def test_a_group_added_in_training(device):
    params = [nn.Parameter(torch.linspace(1, 2, 30, device=device)) for _ in range(2)]
    optimizer = LARS(params[:1], lr=0.5, momentum=0.9)
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    optimizer.add_param_group({"params": params[1:], "momentum": 0.0, "nesterov": False})
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    alone = nn.Parameter(torch.linspace(1, 2, 30, device=device))
    expected = LARS([alone], lr=0.5)
    alone.grad = torch.ones_like(alone)
    expected.step()
    assert same_bits(params[1], alone)
    assert "momentum_buffer" in optimizer.state[params[0]]
    assert params[1] not in optimizer.state


def test_momentum_switched_on_and_off(device):
    """A scheduler may change any option between steps. The buffer stays until momentum is back."""
    p = nn.Parameter(torch.linspace(1, 2, 30, device=device))
    optimizer = LARS([p], lr=0.5)
    for momentum in (0.0, 0.9, 0.0, 0.5):
        optimizer.param_groups[0]["momentum"] = momentum
        p.grad = torch.ones_like(p)
        before = p.detach().clone()
        buffer = optimizer.state[p]["momentum_buffer"].clone() if p in optimizer.state else None
        optimizer.step()
        assert not torch.equal(p, before)
        if momentum == 0 and buffer is not None:
            assert same_bits(optimizer.state[p]["momentum_buffer"], buffer)


@pytest.mark.parametrize("implementation", ["fused", "foreach"])
def test_trust_ratios_are_kept_for_every_parameter(implementation, device):
    """They are those of the step, by parameter. A later step does not overwrite what was returned."""
    params = [nn.Parameter(torch.full((n,), 2.0, device=device)) for n in (4, 0, 9)]
    optimizer = LARS(
        [{"params": params[:2]}, {"params": params[2:], "layer_adaptation": False}],
        lr=0.1,
        trust_coefficient=0.5,
        **{implementation: True},
    )
    assert optimizer.trust_ratios() == {}
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    first = optimizer.trust_ratios()
    assert [first[p].item() for p in params] == [1.0, 1.0, 1.0]  # 0.5 * 2 / 1; empty; not adapted
    assert all(q.device == params[0].device and q.shape == () for q in first.values())
    params[0].grad *= 4
    optimizer.step()
    assert first[params[0]].item() == 1.0
    assert optimizer.trust_ratios()[params[0]].item() < 0.25
