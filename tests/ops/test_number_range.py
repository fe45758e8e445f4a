"""Norms over the whole range of a dtype. Squares only fit half of that range."""

import numpy as np
import pytest
import torch

import bounds
import reference
from layouts import Layout, Layouts
from reference import Rule
from stepping import Dtypes, Leaf, assert_within, call_op, make_leaf, same_bits, to_numpy

# Every decade of a dtype, with subnormal numbers. The norm of several tiles is still finite.
DECADES = {
    torch.float64: range(-323, 305),
    torch.float32: range(-45, 38),
    torch.bfloat16: range(-40, 38),
    torch.float16: range(-7, 4),
}
# One tile and several tiles of each backend, with and without a rest.
SIZES = (1, 33, 1030, 2048, 4099, 8192)
every_dtype = pytest.mark.parametrize("dtype", DECADES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def numbers(decade: int, numel: int, dtype, device, generator, misaligned=False) -> torch.Tensor:
    """Numbers of one decade and either sign, in storage that is NaN around them."""
    x = (8 * torch.rand(numel, generator=generator, dtype=torch.float64) + 1).numpy()
    x[::2] *= -1
    x = (x * np.longdouble(10) ** decade).astype(np.float64)  # 10.0**decade has few digits if it is subnormal
    storage = torch.full((numel + 9,), torch.nan, dtype=dtype)
    first = 1 if misaligned else 0
    storage[first : first + numel] = torch.from_numpy(x).to(dtype)
    return storage.to(device)[first : first + numel]


def norm_error(dtype, norm, numel):
    """The relative error of a norm. If fp64 holds it as a subnormal number, up to all of it."""
    return bounds.norm_error(dtype, numel) + bounds.SMALLEST[torch.float64] / norm


@every_dtype
@pytest.mark.parametrize("misaligned", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_squared_norms_at_every_decade(dtype, misaligned, reverse, device, generator):
    """Weights and gradients come from opposite ends. Squares that leave fp64 are 0 or inf here."""
    # In these decades the squares are normal fp64 numbers, even summed over some thousand elements.
    decades = [d for d in DECADES[dtype] if -150 < d < 150]
    tensors = [
        [
            numbers(decade, SIZES[i % len(SIZES)], dtype, device, generator, misaligned)
            for i, decade in enumerate(order)
        ]
        for order in (decades, decades[::-1])
    ]
    weights, grads = tensors[::-1] if reverse else tensors
    for weight, grad, row in zip(weights, grads, torch.ops.fused_lars.squared_norms(weights, grads).cpu()):
        for x, squared in zip((weight, grad), row):
            expected = reference.norm(to_numpy(x)) ** 2
            error = 2 * bounds.SLACK * bounds.norm_error(dtype, x.numel()) * expected
            assert_within(squared, expected, error, f"|x|^2 of {x.numel()} elements like {x[0].item()}")


def expect_step(op, leaves: list[Leaf]) -> None:
    """Like check_step, plus the absolute errors of numbers at the lower end."""
    before = [{name: x.clone() for name, x in leaf.tensors().items()} for leaf in leaves]
    ratios = call_op(leaves, op=op).cpu()
    for leaf, old, ratio in zip(leaves, before, ratios):
        w, g = to_numpy(old["param"]), to_numpy(old["grad"])
        result = reference.step(w, g, to_numpy(old["momentum_buffer"]), leaf.rule)
        dtype = leaf.param.dtype
        q_error = bounds.SLACK * sum(norm_error(dtype, reference.norm(x), w.size) for x in (w, g))
        q_error += 8 * bounds.ROUNDOFF[torch.float64]
        assert_within(ratio, result.trust_ratio, q_error * result.trust_ratio, f"{leaf.name}: trust ratio")
        u = bounds.ROUNDOFF[torch.float64 if dtype == torch.float64 else torch.float32]
        # Each of at most 10 products may round to a multiple of the smallest number. Two of them are
        # multiplied by a ratio of at most trust_coefficient / weight_decay.
        underflow = 10 * bounds.SMALLEST[torch.float64 if dtype == torch.float64 else torch.float32]
        errors = ((q_error + 13 * u) * result.update_terms, (q_error + 8 * u) * result.buffer_terms)
        weight_error, buffer_error = (bounds.SLACK * error + underflow for error in errors)
        weight_error = weight_error + u * np.abs(result.weight)
        assert_within(leaf.param, result.weight, weight_error, f"{leaf.name}: param")
        assert_within(leaf.momentum_buffer, result.momentum_buffer, buffer_error, f"{leaf.name}: buffer")


@every_dtype
@pytest.mark.parametrize("op", ["step_", "reference_step_"])
@pytest.mark.parametrize("varied", ["weight", "grad", "both"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.25])
def test_step_at_every_decade(dtype, op, varied, weight_decay, device, generator):
    rule = Rule(lr=0.5, trust_coefficient=0.5, weight_decay=weight_decay, momentum=0.5)
    leaves = []
    for i, decade in enumerate(DECADES[dtype]):
        numel = SIZES[i % len(SIZES)]
        leaf = make_leaf("", Layouts(Layout((numel,))), Dtypes(dtype), rule, device, generator)
        leaf.name = f"1e{decade}, {numel} elements"
        if varied != "grad":
            leaf.param = numbers(decade, numel, dtype, device, generator)
        if varied != "weight":
            leaf.grad = numbers(decade, numel, dtype, device, generator)
        leaf.momentum_buffer.zero_()
        leaves.append(leaf)
    expect_step(op, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("op", ["step_", "reference_step_"])
def test_one_tensor_of_all_decades(dtype, op, device, generator):
    """Tiles of zeros, in range and out of range either way, and elements that alone decide the norm."""
    tiny, huge = (-300, 300) if dtype == torch.float64 else (-38, 37)
    rule = Rule(lr=0.5, trust_coefficient=0.5, momentum=0.5)
    leaves = []
    for decades in ([0, tiny], [huge, 0, tiny], [tiny, None, huge], [None, tiny], [tiny // 2, huge // 2]):
        parts = [
            torch.zeros(4096, dtype=dtype)
            if decade is None
            else numbers(decade, 4096, dtype, "cpu", generator)
            for decade in decades
        ]
        x = torch.cat(parts)[:-7]
        for param, grad in ((x, torch.ones_like(x)), (torch.ones_like(x), x), (x, x.flip(0))):
            leaf = make_leaf("", Layouts(Layout((x.numel(),))), Dtypes(dtype), rule, device, generator)
            leaf.name = f"tiles of {decades}"
            leaf.param, leaf.grad = param.clone().to(device), grad.clone().to(device)
            leaf.momentum_buffer.zero_()
            leaves.append(leaf)
    for decade in (tiny, huge):
        leaf = make_leaf("one of 5,000", Layouts(Layout((5000,))), Dtypes(dtype), rule, device, generator)
        leaf.grad.zero_()
        leaf.grad[4321] = numbers(decade, 1, dtype, device, generator)[0]
        leaf.momentum_buffer.zero_()
        leaves.append(leaf)
    expect_step(op, leaves)


def test_norms_where_subnormal_numbers_are_flushed(generator):
    """Numbers that are not subnormal, but whose squares are."""
    leaves = []
    rule = Rule(lr=0.5, trust_coefficient=0.5, momentum=0.5)
    if not torch.set_flush_denormal(True):
        pytest.skip("the processor cannot flush subnormal numbers")
    try:
        for decade in range(-30, -10):
            x = numbers(decade, 4099, torch.float32, "cpu", generator)
            leaves.append(Leaf("", rule, x, x.flip(0)))
        squared = torch.ops.fused_lars.squared_norms(
            [leaf.param for leaf in leaves], [leaf.grad for leaf in leaves]
        )
    finally:
        torch.set_flush_denormal(False)
    for leaf, row in zip(leaves, squared):
        expected = reference.norm(to_numpy(leaf.param)) ** 2
        error = 2 * bounds.SLACK * bounds.norm_error(torch.float32, 4099) * expected
        assert_within(row, [expected] * 2, error, f"like {leaf.param[0].item()}")


@every_dtype
@pytest.mark.parametrize("op", ["step_", "reference_step_"])
@pytest.mark.parametrize("numel", [40, 9000])
def test_numbers_that_are_none(dtype, op, numel, device, generator):
    """q is 0 for an infinite gradient, NaN for an infinite weight, and 1 for another NaN or a norm of 0."""
    largest = torch.finfo(dtype).max / numel
    rule = Rule(lr=0.5, trust_coefficient=0.5)
    leaves, expected = [], []
    for where, value, ratio in (
        ("grad", torch.inf, 0.0),
        ("grad", torch.nan, 1.0),
        ("param", torch.nan, 1.0),
        ("param", torch.inf, torch.nan),
    ):
        for neighbour in (0.0, 1.0, largest, torch.finfo(dtype).smallest_normal):
            leaf = make_leaf(where, Layouts(Layout((numel,))), Dtypes(dtype), rule, device, generator)
            x = getattr(leaf, where)
            x.fill_(neighbour)
            x[numel // 2] = value
            leaves.append(leaf)
            expected.append(ratio)
    zero = make_leaf("zero", Layouts(Layout((numel,))), Dtypes(dtype), rule, device, generator)
    zero.grad.zero_()
    ratios = call_op([*leaves, zero], op=op)
    expected = torch.tensor([*expected, 1.0], dtype=torch.float64)
    torch.testing.assert_close(ratios.cpu(), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("op", ["step_", "reference_step_"])
def test_a_ratio_beyond_fp32_moves_the_weights(op, device, generator):
    """|w| / |g| is 1e-42 or 1e42, but the update still has the size of the weights."""
    rule = Rule(lr=1.0, momentum=0.5)
    leaves = []
    for weight, grad in ((0, -41), (2, -44), (-6, 37), (-4, 37), (20, -20), (-20, 20)):
        leaf = make_leaf("", Layouts(Layout((1030,))), Dtypes(torch.float32), rule, device, generator)
        leaf.name = f"w 1e{weight}, g 1e{grad}"
        leaf.param = numbers(weight, 1030, torch.float32, device, generator)
        leaf.grad = numbers(grad, 1030, torch.float32, device, generator)
        leaf.momentum_buffer = torch.zeros_like(leaf.param)
        leaves.append(leaf)
    before = [leaf.param.clone() for leaf in leaves]
    expect_step(op, leaves)
    assert not any(map(same_bits, before, (leaf.param for leaf in leaves)))
