"""Parameters on several devices in one group, and a device without its own kernels."""

import pytest
import torch
from torch import nn

from fused_lars import LARS
from stepping import same_bits


def train(params, steps=3, **options):
    optimizer = LARS(params, lr=0.5, momentum=0.9, trust_coefficient=0.5, **options)
    for step in range(steps):
        for p in params:
            p.grad = torch.cos(p.detach() * (1 + step))
        optimizer.step()
    return optimizer


def devices():
    if torch.cuda.device_count() >= 2:
        return ["cuda:0", "cuda:1", "cpu"]
    return ["cuda:0", "cpu"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch.cuda is not available")
@pytest.mark.parametrize("lr", [0.5, "cpu tensor", "cuda tensor"])
def test_several_devices_in_one_group_cuda(lr):
    """Each device's parameters get the bits that they get alone."""
    values = [torch.linspace(-1, 2, 40), torch.linspace(1, 3, 1000)]
    params = [nn.Parameter(x.clone().to(d)) for x in values for d in devices()]
    if isinstance(lr, str):
        lr = torch.tensor(0.5, device=lr.split()[0])
    optimizer = LARS(params, lr=lr, momentum=0.9, trust_coefficient=0.5)
    for p in params:
        p.grad = torch.cos(p.detach())
    optimizer.grad_scale = torch.tensor(1.0, device="cuda:0")
    optimizer.found_inf = torch.tensor(0.0, device="cuda:0")
    optimizer.step()
    for p in params:
        alone = nn.Parameter(values[0 if p.numel() == 40 else 1].clone().to(p.device))
        expected = LARS([alone], lr=0.5, momentum=0.9, trust_coefficient=0.5)
        alone.grad = torch.cos(alone.detach())
        expected.step()
        assert same_bits(p, alone)
        assert optimizer.state[p]["momentum_buffer"].device == p.device
        assert optimizer.trust_ratios()[p].device == p.device


def test_cpu_and_meta_in_one_group():
    """Meta parameters are stepped without computing, as when a model is built before it has memory."""
    real, meta = nn.Parameter(torch.linspace(1, 2, 30)), nn.Parameter(torch.empty(5, 6, device="meta"))
    optimizer = train([real, meta])
    alone = nn.Parameter(torch.linspace(1, 2, 30))
    train([alone])
    assert same_bits(real, alone)
    buffer = optimizer.state[meta]["momentum_buffer"]
    assert buffer.is_meta
    assert buffer.shape == meta.shape


def test_momentum_in_8_bits_on_meta():
    meta = nn.Parameter(torch.empty(5, 60, dtype=torch.bfloat16, device="meta"))
    optimizer = train([meta], momentum_dtype="int8", stochastic_rounding=True)
    state = optimizer.state[meta]
    assert {name: (x.device.type, x.dtype, tuple(x.shape)) for name, x in state.items()} == {
        "momentum_buffer": ("meta", torch.int8, (5, 60)),
        "momentum_scale": ("meta", torch.float32, (3,)),
        "rng_state": ("meta", torch.int64, (3,)),
    }
    state["rng_state"] = torch.empty(2, dtype=torch.int64, device="meta")
    with pytest.raises(ValueError, match=r"rng_states\[0\] has shape \[2\]; expected \[3\]"):
        optimizer.step()


def test_meta_tensors_are_checked_too():
    meta = nn.Parameter(torch.empty(5, 6, device="meta"))
    optimizer = train([meta])
    optimizer.state[meta]["momentum_buffer"] = torch.empty(5, device="meta")
    with pytest.raises(ValueError, match=r"momentum_buffers\[0\] has shape \[5\]"):
        optimizer.step()


def test_more_than_2_to_the_31_elements_on_meta():
    """Sizes are 64 bits wide all the way through the optimizer and the op."""
    meta = nn.Parameter(torch.empty(3 * 2**31, dtype=torch.bfloat16, device="meta"))
    optimizer = train([meta], master_weights=True)
    assert optimizer.state[meta]["master_param"].numel() == 3 * 2**31


def test_nothing_changes_on_any_device_before_a_bad_tensor_is_found():
    """Each device has its own call, but all calls are checked before the first one writes."""
    params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.empty(4, device="meta"))]
    optimizer = train(params, steps=1)
    before = params[0].detach().clone(), optimizer.state[params[0]]["momentum_buffer"].clone()
    optimizer.state[params[1]]["momentum_buffer"] = torch.empty(5, device="meta")
    with pytest.raises(ValueError, match=r"has shape \[5\].*param_groups\[0\]\['params'\]\[1\]"):
        optimizer.step()
    assert same_bits(params[0], before[0])
    assert same_bits(optimizer.state[params[0]]["momentum_buffer"], before[1])
