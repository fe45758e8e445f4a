"""Many tensors, and large tensors, on every device."""

import pytest
import torch

import bounds
from layouts import Layout, Layouts
from reference import Rule
from stepping import Dtypes, call_op, check_step, make_leaf

RULE = Rule(lr=0.5, momentum=0.6, weight_decay=0.3, trust_coefficient=0.7)


def test_3000_tensors(device, generator):
    """More than a kernel's parameters hold, with sizes around a vector's and a block's. The last is empty."""
    sizes = [(1, 3, 4, 17, 31, 64, 130, 257)[i % 8] for i in range(2999)] + [0]
    dtypes = Dtypes(torch.float32), Dtypes(torch.float32, state=torch.int8)
    leaves = [
        make_leaf(f"{i}", Layouts(Layout((n,))), dtypes[i % 3 == 0], RULE, device, generator)
        for i, n in enumerate(sizes)
    ]
    check_step("op", leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_20_million_elements(dtype, device):
    """One tensor, checked by its norms, its trust ratio and parts of the update."""
    numel, rule = 20_000_003, Rule(lr=0.5, weight_decay=0.3, trust_coefficient=0.7)
    generator = torch.Generator().manual_seed(0)
    param, grad = (torch.rand(numel, generator=generator).to(dtype) for _ in range(2))
    w, g = (x.double().square().sum().sqrt() for x in (param, grad))
    q = 0.7 * w / (g + 0.3 * w)
    before = param.clone()
    leaf = make_leaf("w", Layouts(Layout(())), Dtypes(dtype), rule, device, generator)
    leaf.param, leaf.grad = param.to(device), grad.to(device)
    ratio = call_op([leaf]).cpu()
    error = bounds.trust_ratio_error(dtype, dtype, numel)
    torch.testing.assert_close(ratio[0], q, rtol=error, atol=0)
    # The ends, and places around multiples of 2^20, where tiles, blocks and threads change.
    places = [0, *range(2**20, numel, 2**20), numel]
    index = torch.cat([torch.arange(max(0, k - 3), min(numel, k + 3)) for k in places])
    weight, change = before[index].double(), 0.5 * q * (grad[index].double() + 0.3 * before[index].double())
    off = (leaf.param.cpu()[index].double() - (weight - change)).abs()
    u = bounds.ROUNDOFF[torch.float32]
    allowed = (error + 13 * u) * change + (u + bounds.ROUNDOFF[dtype]) * (weight - change).abs()
    assert (off <= bounds.SLACK * allowed).all()
