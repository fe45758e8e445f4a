"""layer_norms() and trust_ratios(): by parameter, by name, as numbers. stepping.py checks the values."""

import json
import math

import pytest
import torch
from torch import nn

from fused_lars import LARS, param_groups
from stepping import same_bits

WAYS = [{"fused": True}, {"foreach": True}, {}]


def make_model(device="cpu"):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 4000), nn.Tanh(), nn.Linear(4000, 3)).to(device)


def backward(model, factor=1.0):
    device = next(model.parameters()).device
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(1)).to(device)
    model.zero_grad()
    (factor * model(x).square().mean()).backward()


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_norms_of_every_parameter_before_the_step(way, device):
    """Also of parameters without adaptation, with one tile or several, whose step needs no norms."""
    model = make_model(device)
    layers = model[0], model[2]
    optimizer = LARS(
        [
            {"params": [layers[0].weight, layers[1].bias]},
            {"params": [layers[1].weight, layers[0].bias], "layer_adaptation": False},
        ],
        lr=0.1,
        trust_coefficient=0.5,
        **way,
    )
    assert optimizer.layer_norms() == {}
    for factor in (1.0, 3.0):
        backward(model, factor)
        expected = {p: (p.detach().double().norm(), p.grad.double().norm()) for p in model.parameters()}
        optimizer.step()
        norms = optimizer.layer_norms()
        assert set(norms) == set(model.parameters())
        for p, (weight, grad) in expected.items():
            torch.testing.assert_close(norms[p].weight, weight, rtol=1e-6, atol=0)
            torch.testing.assert_close(norms[p].grad, grad, rtol=1e-6, atol=0)
            assert norms[p].grad.device == p.device


def test_what_was_given_out_stays(device):
    model = make_model(device)
    optimizer = LARS(model.parameters(), lr=0.1)
    backward(model)
    optimizer.step()
    first = optimizer.layer_norms()
    kept = {p: norm.grad.clone() for p, norm in first.items()}
    backward(model, 7.0)
    optimizer.step()
    assert all(same_bits(first[p].grad, kept[p]) for p in kept)


@pytest.mark.parametrize("named", [True, False])
def test_by_name_as_numbers(named, device):
    model = make_model(device)
    groups = param_groups(model) if named else [{"params": list(model.parameters())}]
    optimizer = LARS(groups, lr=0.1, trust_coefficient=0.5)
    backward(model)
    model[2].bias.grad = None
    optimizer.step()
    if named:
        names = {name: p for name, p in model.named_parameters() if p.grad is not None}
    else:
        names = {f"param_groups[0]['params'][{i}]": p for i, p in enumerate(model.parameters()) if i < 3}
    ratios = optimizer.trust_ratios(by_name=True, as_numbers=True)
    norms = optimizer.layer_norms(by_name=True, as_numbers=True)
    assert set(ratios) == set(norms) == set(names)
    for name, p in names.items():
        assert ratios[name] == optimizer.trust_ratios()[p].item()
        assert norms[name].weight == optimizer.layer_norms(as_numbers=True)[p].weight
        assert norms[name].grad == optimizer.layer_norms(by_name=True)[name].grad.item()
    assert json.loads(json.dumps(norms)) == {name: list(norm) for name, norm in norms.items()}
    assert json.loads(json.dumps(ratios)) == ratios


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_nan_shows_in_its_layer_only(way, device):
    model = make_model(device)
    optimizer = LARS(param_groups(model), lr=0.1, momentum=0.9, **way)
    backward(model)
    model[0].weight.grad[7, 3] = torch.nan
    optimizer.step()
    norms = optimizer.layer_norms(by_name=True, as_numbers=True)
    assert [name for name, norm in norms.items() if math.isnan(norm.grad)] == ["0.weight"]
    assert not any(math.isnan(norm.weight) for norm in norms.values())


@pytest.mark.parametrize("decayed_norm", [False, True])
@pytest.mark.parametrize("way", [{"fused": True}, {}], ids=str)
def test_gradients_of_a_scaler_are_unscaled(way, decayed_norm, device):
    """Either the kernels or the scaler may unscale. A skipped step leaves the norms of the step before."""
    model = make_model(device)
    optimizer = LARS(model.parameters(), lr=0.1, weight_decay=0.3, decayed_norm=decayed_norm, **way)
    scaler = torch.amp.GradScaler(device, init_scale=1024.0)
    backward(model)
    expected = [
        (p.grad + 0.3 * p.detach() if decayed_norm else p.grad).double().norm() for p in model.parameters()
    ]
    backward(model, scaler.scale(torch.ones((), device=device)))
    scaler.step(optimizer)
    scaler.update()
    norms = [norm.grad for norm in optimizer.layer_norms().values()]
    torch.testing.assert_close(norms, expected, rtol=1e-6, atol=0)
    backward(model, 5.0)
    model[0].weight.grad[0, 0] = torch.inf
    scaler.scale(torch.ones((), device=device))
    scaler.step(optimizer)
    assert all(same_bits(a, b.grad) for a, b in zip(norms, optimizer.layer_norms().values()))


def test_a_refused_step_leaves_the_record(device):
    model = make_model(device)
    optimizer = LARS(model.parameters(), lr=0.1)
    backward(model)
    optimizer.step()
    before = optimizer.layer_norms(by_name=True, as_numbers=True)
    model[0].weight.grad = None
    optimizer.param_groups[0]["lr"] = -1.0
    with pytest.raises(ValueError, match="Invalid learning rate"):
        optimizer.step()
    assert optimizer.layer_norms(by_name=True, as_numbers=True) == before


def test_a_parameter_without_a_name_has_its_place(device):
    model = make_model(device)
    optimizer = LARS(model.named_parameters(), lr=0.1)
    optimizer.param_groups[0]["params"].append(nn.Parameter(torch.ones(3, device=device)))
    backward(model)
    optimizer.param_groups[0]["params"][-1].grad = torch.ones(3, device=device)
    optimizer.step()
    names = [*dict(model.named_parameters()), "param_groups[0]['params'][4]"]
    assert list(optimizer.layer_norms(by_name=True)) == names
