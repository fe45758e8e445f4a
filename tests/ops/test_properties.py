"""Tests any shapes, strides, dtypes, groups and options with hypothesis, against the fp64 reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cases import DTYPES, ROUNDED_DTYPES
from layouts import Layout, Layouts
from reference import Rule
from stepping import IMPLEMENTATIONS, Dtypes, check_step, make_leaf


@st.composite
def layouts(draw, sizes):
    """Draws strides for permuted dimensions, with gaps of some elements after each, and an offset."""
    order = draw(st.permutations(range(len(sizes))))
    strides, step = [0] * len(sizes), 1
    for d in order:
        step += draw(st.integers(0, 2))
        strides[d] = step
        step *= max(sizes[d], 1)
    return Layout(sizes, tuple(strides), draw(st.integers(0, 5)))


@st.composite
def parameter_layouts(draw):
    # From none to more than a tile of elements, around the widths of vectors and of chunks.
    one_dimension = st.sampled_from([0, 1, 2, 7, 8, 15, 16, 17, 31, 33, 63, 65, 511, 513, 4095, 4097]).map(
        lambda n: (n,)
    )
    sizes = draw(st.one_of(one_dimension, st.lists(st.integers(0, 6), max_size=4).map(tuple)))
    param = draw(layouts(sizes))
    same = st.none()
    expanded = st.just(Layout(sizes, (0,) * len(sizes)))
    return Layouts(
        param, draw(st.one_of(same, layouts(sizes), expanded)), draw(st.one_of(same, layouts(sizes)))
    )


@st.composite
def rules(draw):
    number = lambda low, high: st.floats(low, high, allow_nan=False)  # noqa: E731
    momentum = draw(st.one_of(st.just(0.0), number(0.01, 0.99)))
    classic = draw(st.booleans())
    nesterov = momentum > 0 and draw(st.booleans())
    return Rule(
        lr=draw(st.one_of(st.just(0.0), number(1e-3, 4.0))),
        momentum=momentum,
        weight_decay=draw(st.one_of(st.just(0.0), number(1e-4, 1.0))),
        trust_coefficient=draw(number(1e-3, 1.0)),
        eps=draw(st.one_of(st.just(0.0), number(1e-8, 1.0))),
        dampening=0.0 if classic or nesterov else draw(st.one_of(st.just(0.0), number(0.01, 1.0))),
        nesterov=nesterov,
        maximize=draw(st.booleans()),
        trust_clip=draw(st.booleans()),
        layer_adaptation=draw(st.booleans()),
        decayed_norm=draw(st.booleans()),
        classic_momentum=classic,
        **draw(st.sampled_from([{}, {"master_weights": True}, {"stochastic_rounding": True}])),
    )


@st.composite
def steps(draw, device):
    """Draws leaves of one to three groups with all their options, and how to step them."""
    leaves = []
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    for _ in range(draw(st.integers(1, 3))):
        rule = draw(rules())
        for k in range(draw(st.integers(1, 3))):
            dtypes = draw(st.sampled_from([*DTYPES.values(), *ROUNDED_DTYPES.values()]))
            is_half = dtypes.param in (torch.float16, torch.bfloat16)
            dtypes = Dtypes(dtypes.param, dtypes.grad, dtypes.state, rule.master_weights and is_half)
            leaves.append(make_leaf(f"{k}", draw(parameter_layouts()), dtypes, rule, device, generator))
    scale = draw(st.one_of(st.none(), st.floats(2.0**-6, 2.0**6, width=32)))
    found_inf = draw(st.sampled_from([None, None, 0.0, 1.0, 2.0]))
    keywords = dict(
        tensor_lr=draw(st.booleans()),
        grad_scale=None if scale is None else torch.tensor(scale, device=device),
        found_inf=None if found_inf is None else torch.tensor(found_inf, device=device),
    )
    return draw(st.sampled_from(IMPLEMENTATIONS)), leaves, keywords


@given(steps("cpu"))
@settings(max_examples=400)
def test_any_step(step):
    implementation, leaves, keywords = step
    check_step(implementation, leaves, **keywords)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch.cuda is not available")
@given(steps("cuda"))
@settings(max_examples=60)
def test_any_step_cuda(step):
    implementation, leaves, keywords = step
    check_step(implementation, leaves, **keywords)
