"""differentiable=True: gradients flow through a step to weights, gradients, state and lr."""

import pytest
import torch
from torch.autograd import gradcheck

from fused_lars import LARS

OPTIONS = {
    "plain": dict(lr=0.3, trust_coefficient=0.5),
    "classic": dict(lr=0.3, momentum=0.6, weight_decay=0.1, trust_coefficient=0.5),
    "classic nesterov": dict(lr=0.3, momentum=0.6, weight_decay=0.1, trust_coefficient=0.5, nesterov=True),
    "torch": dict(lr=0.3, momentum=0.6, weight_decay=0.1, trust_coefficient=0.5, classic_momentum=False),
    "dampening": dict(lr=0.3, momentum=0.6, dampening=0.4, classic_momentum=False),
    "maximize, eps": dict(lr=0.3, weight_decay=0.1, trust_coefficient=0.5, maximize=True, eps=0.2),
    "decayed norm": dict(lr=0.3, momentum=0.6, weight_decay=0.4, trust_coefficient=0.5, decayed_norm=True),
    "no adaptation": dict(lr=0.3, weight_decay=0.1, layer_adaptation=False),
    "clip that clips": dict(lr=0.3, trust_coefficient=2.0, trust_clip=True),
    "clip that does not": dict(lr=3.0, trust_coefficient=0.5, trust_clip=True),
}


def make(*sizes):
    return torch.randn(
        *sizes, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    ).requires_grad_()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradcheck(options):
    def step(weight, grad, buffer, lr):
        weight = weight.clone()  # steps are in place, which leaves that require grad do not allow
        weight.grad = grad
        optimizer = LARS([weight], **{**options, "lr": lr}, differentiable=True)
        if options.get("momentum"):
            optimizer.state[weight]["momentum_buffer"] = buffer = buffer.clone()
        optimizer.step()
        return weight, buffer

    lr = torch.tensor(options["lr"], dtype=torch.float64, requires_grad=True)
    assert gradcheck(step, (make(3, 2), make(3, 2).detach().flip(0).requires_grad_(), make(3, 2), lr))


@pytest.mark.parametrize("zero", ["weight", "grad"])
def test_gradients_are_finite_at_zero_norms(zero):
    """sqrt has no derivative at 0. The branch that is not chosen must not leak NaN. q is 1 there."""
    weight, grad = make(4), make(4)
    with torch.no_grad():
        (weight if zero == "weight" else grad).zero_()
    stepped = weight.clone()
    stepped.grad = grad
    LARS([stepped], lr=0.3, weight_decay=0.1, differentiable=True).step()
    by_weight, by_grad = torch.autograd.grad(stepped.sum(), (weight, grad))
    torch.testing.assert_close(by_weight, torch.full_like(by_weight, 1 - 0.3 * 0.1))
    torch.testing.assert_close(by_grad, torch.full_like(by_grad, -0.3))


def test_learning_the_learning_rate():
    """Three steps of an inner loop, differentiated by lr: the usual reason for differentiable=True."""
    lr = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def inner(lr):
        weight = make(5).detach().clone().requires_grad_().clone()
        optimizer = LARS([weight], lr=lr, momentum=0.5, trust_coefficient=0.2, differentiable=True)
        for _ in range(3):
            loss = (weight.clone() ** 2).sum()  # clone, because the step writes the weight
            weight.grad = torch.autograd.grad(loss, weight, create_graph=True)[0]
            optimizer.step()
        return (weight**2).sum()

    slope = torch.autograd.grad(inner(lr), lr)[0]
    h = 1e-6
    numeric = (inner(lr.detach() + h) - inner(lr.detach() - h)) / (2 * h)
    torch.testing.assert_close(slope, numeric, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_without_autograd_it_is_the_same_step(options):
    results = []
    for implementation in (dict(differentiable=True), dict(foreach=True)):
        weight = make(3, 2).detach()
        weight.grad = make(3, 2).detach().flip(0)
        LARS([weight], **options, **implementation).step()
        results.append(weight)
    assert torch.equal(*results)


def test_a_group_of_its_own():
    """Autograd follows the groups that ask for it, whatever the optimizer's default."""
    for default in (False, True):
        lr = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
        weights = [make(5).detach().clone().requires_grad_(not followed) for followed in (True, False)]
        groups = [
            {"params": [weights[0]], "lr": lr, "differentiable": True},
            {"params": [weights[1]], "differentiable": False},
        ]
        optimizer = LARS(groups, lr=0.3, differentiable=default)
        for weight in weights:
            weight.grad = make(5).detach().flip(0)
        optimizer.step()
        assert weights[0].grad_fn is not None
        assert weights[1].is_leaf
        assert torch.equal(*(weight.detach() for weight in weights))
        assert torch.autograd.grad(weights[0].sum(), lr)[0] != 0
