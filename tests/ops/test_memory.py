"""What a step allocates, and how it tells autograd that tensors have changed."""

import os

import pytest
import torch
from torch import nn

from fused_lars import LARS
from layouts import Layout, Layouts
from reference import Rule
from stepping import STATE, Dtypes, call_op, make_leaf

NUMEL = 300_000


def peak_bytes(run) -> int:
    """The most memory on the CPU that `run` had allocated at a time, beyond what there was before."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    total = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak


def test_the_measure_sees_a_temporary():
    x = torch.ones(NUMEL)
    assert peak_bytes(lambda: x * 2) >= 4 * NUMEL


@pytest.mark.parametrize(
    "dtypes",
    [
        Dtypes(torch.float32),
        Dtypes(torch.bfloat16),
        Dtypes(torch.bfloat16, torch.float32),
        Dtypes(torch.float16, torch.float16, torch.float32, master=True),
        Dtypes(torch.float64, torch.float32),
        Dtypes(torch.float32, torch.float32, torch.int8),
        Dtypes(torch.bfloat16, stochastic=True),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "layout", [Layout((NUMEL,)), Layout((500, 600), (1, 500)), Layout((NUMEL,), None, 1)], ids=str
)
def test_no_parameter_sized_temporaries(dtypes, layout, generator):
    rule = Rule(momentum=0.9, nesterov=True, weight_decay=0.1, **dtypes.switches)
    leaf = make_leaf("w", Layouts(layout), dtypes, rule, "cpu", generator)
    assert peak_bytes(lambda: call_op([leaf])) < NUMEL / 10


def test_the_optimizer_keeps_no_more_than_its_state(generator):
    param = nn.Parameter(torch.randn(NUMEL, generator=generator))
    param.grad = torch.randn(NUMEL, generator=generator)
    optimizer = LARS([param], lr=0.1, momentum=0.9)
    assert 4 * NUMEL <= peak_bytes(optimizer.step) < 4.1 * NUMEL  # the momentum buffer
    assert peak_bytes(optimizer.step) < NUMEL / 10
    without = LARS([param], lr=0.1)
    assert peak_bytes(without.step) < NUMEL / 10


@pytest.mark.parametrize("op", ["step_", "reference_step_"])
def test_versions_of_what_is_written_are_bumped(op, device, generator):
    rule = Rule(momentum=0.9, dampening=0.1, classic_momentum=False, master_weights=True)
    dtypes = Dtypes(torch.bfloat16, state=torch.int8, master=True)  # with every kind of state
    leaf = make_leaf("w", Layouts(Layout((8,))), dtypes, rule, device, generator)
    assert {"param", "grad", *STATE} == {*leaf.tensors()}
    before = {name: tensor._version for name, tensor in leaf.tensors().items()}
    ratios = call_op([leaf], op=op)
    for name, tensor in leaf.tensors().items():
        assert (tensor._version > before[name]) == (name != "grad"), name
    assert ratios._version > 0


@pytest.mark.parametrize("implementation", ["fused", "foreach"])
def test_autograd_notices_a_step_between_forward_and_backward(implementation, device):
    param = nn.Parameter(torch.ones(3, device=device))
    optimizer = LARS([param], lr=0.1, **{implementation: True})
    loss = (param * param).sum()
    param.grad = torch.ones_like(param)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# More elements than an int can count. This needs much memory and time, so it runs only on request.
large = pytest.mark.skipif(
    not os.environ.get("FUSED_LARS_LARGE_TESTS"), reason="needs 14 GB; FUSED_LARS_LARGE_TESTS=1 runs it"
)


@large
@pytest.mark.parametrize("strided", [False, True], ids=["dense", "columns"])
def test_more_elements_than_2_to_the_31(strided, device):
    """Checks the first and last elements of a bf16 tensor whose gradient equals it: w -= lr * w."""
    numel = 2**31 + 4097
    param = torch.zeros(numel, dtype=torch.bfloat16, device=device)
    if strided:
        param = param.as_strided((2, numel // 2), (1, 2))
    flat = param.as_strided((numel,), (1,))
    marks = torch.tensor([0, 1, 2**31 - 1, 2**31, 2**31 + 1, numel - 2, numel - 1], device=device)[
        : -1 if strided else None
    ]
    flat[marks] = torch.arange(1.0, 1 + len(marks), device=device).bfloat16()
    squares = flat[marks].double().square().sum()
    call_ratio = torch.ops.fused_lars.squared_norms([param], [param])
    torch.testing.assert_close(call_ratio[0], squares.expand(2), rtol=1e-6, atol=0)
    param = nn.Parameter(param)
    optimizer = LARS([param], lr=0.5, trust_coefficient=1.0)
    param.grad = param.detach().clone()
    optimizer.step()
    expected = torch.arange(1.0, 1 + len(marks), device=device) / 2
    assert torch.equal(flat[marks].float(), expected)
    assert flat.count_nonzero() == len(marks)
