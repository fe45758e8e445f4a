"""What only a CUDA step has: capture, streams, a workspace, many launches, faults."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from fused_lars import LARS
from stepping import same_bits

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch.cuda is not available")

SIZES = (1, 33, 4096, 20_003, 0, 9_000)
OPTIONS = {"momentum": 0.9, "weight_decay": 1e-3, "trust_coefficient": 0.5}


def make_params(sizes=SIZES, dtype=torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    params = []
    for n in sizes:
        params.append(nn.Parameter(torch.randn(n, generator=generator).to("cuda", dtype)))
        params[-1].grad = torch.randn(n, generator=generator).to("cuda", dtype)
    return params


def groups_of(params) -> list[dict]:
    return [{"params": params[::2]}, {"params": params[1::2], "weight_decay": 0.0, "layer_adaptation": False}]


def state_of(optimizer) -> list[torch.Tensor]:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [x.detach().clone() for p in params for x in (p, *optimizer.state[p].values())]


@pytest.mark.parametrize("momentum_dtype", [None, torch.bfloat16, "int8"])
@pytest.mark.parametrize("decayed_norm", [False, True])
def test_captured_steps_are_eager_steps_cuda(decayed_norm, momentum_dtype):
    """A replay follows a new lr and new gradients, and draws new bits. An overflow changes nothing."""
    script = [(0.5, 1.0, 0.0), (0.25, -2.0, 0.0), (0.25, 3.0, 1.0), (0.125, 3.0, 0.0), (0.125, 1.0, 2.0)]

    def prepare():
        params = make_params()
        optimizer = LARS(groups_of(params), lr=torch.tensor(0.5, device="cuda"), capturable=True, **OPTIONS)
        for group in optimizer.param_groups:
            group["decayed_norm"] = decayed_norm
            group["momentum_dtype"] = momentum_dtype
        optimizer.grad_scale = torch.tensor(4.0, device="cuda")
        optimizer.found_inf = torch.tensor(0.0, device="cuda")
        first = [p.grad.clone() for p in params]
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            optimizer.step()  # creates the state, as torch requires before a capture
        torch.cuda.current_stream().wait_stream(stream)
        return params, optimizer, first

    def feed(params, optimizer, first, lr, factor, found_inf):
        for group in optimizer.param_groups:
            group["lr"].fill_(lr)
        optimizer.found_inf.fill_(found_inf)
        for p, grad in zip(params, first):
            p.grad.copy_(grad * factor)

    params, optimizer, first = prepare()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    expected_params, expected, expected_first = prepare()
    for inputs in script:
        feed(params, optimizer, first, *inputs)
        feed(expected_params, expected, expected_first, *inputs)
        before = state_of(optimizer)
        graph.replay()
        expected.step()
        torch.cuda.synchronize()
        after = state_of(optimizer)
        assert all(map(same_bits, after, state_of(expected)))
        for norms in zip(optimizer.layer_norms().values(), expected.layer_norms().values(), strict=True):
            assert all(map(same_bits, *norms))
        # Without this, a graph and an optimizer that both do nothing would agree.
        assert all(map(same_bits, before, after)) == (inputs[2] != 0.0)


@pytest.mark.parametrize("captured", [slice(0, 2), slice(0, 6)], ids=["few", "all"])
def test_a_graph_goes_on_after_other_eager_steps_cuda(captured):
    """After eager steps on more or fewer parameters, a graph still has the memory of its capture."""

    def step_with_grads(optimizer, params, have_grads, step):
        for p in params:
            p.grad = None
        for p, grad in list(zip(params, grads))[have_grads]:
            p.grad = grad
        step()

    params, alone = make_params(), make_params()
    grads = [p.grad for p in params]
    optimizer, expected = LARS(params, lr=0.5, **OPTIONS), LARS(alone, lr=0.5, **OPTIONS)
    graph = torch.cuda.CUDAGraph()

    def capture():
        with torch.cuda.graph(graph):
            optimizer.step()

    for group in optimizer.param_groups:
        group["capturable"] = True
    step_with_grads(optimizer, params, captured, optimizer.step)
    step_with_grads(optimizer, params, captured, capture)
    sequence = [graph.replay, slice(0, 6), graph.replay, slice(1, 2), slice(0, 6), graph.replay]
    step_with_grads(expected, alone, captured, expected.step)
    for what in sequence:
        have_grads = captured if what == graph.replay else what
        if what == graph.replay:
            graph.replay()
        else:
            step_with_grads(optimizer, params, have_grads, optimizer.step)
        step_with_grads(expected, alone, have_grads, expected.step)
        torch.cuda.synchronize()
        assert all(map(same_bits, params, alone))


def test_a_step_captured_without_a_step_before_cuda():
    """Only the graph zeroes its workspace. Later eager steps use another one."""
    params, alone = make_params(), make_params()
    optimizer, expected = LARS(params, lr=0.5, **OPTIONS), LARS(alone, lr=0.5, **OPTIONS)
    for group in optimizer.param_groups:
        group["capturable"] = True
    for p in params:  # creates the state that torch requires before a capture
        optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for step in (optimizer.step, graph.replay, graph.replay, optimizer.step):
        step()
        expected.step()
        torch.cuda.synchronize()
        assert all(map(same_bits, params, alone))


def test_a_side_stream_is_respected_cuda():
    """A step on a side stream waits for what that stream waits for, and for nothing else."""
    params, alone = make_params(), make_params()
    optimizer, expected = LARS(params, lr=0.5, **OPTIONS), LARS(alone, lr=0.5, **OPTIONS)
    side = torch.cuda.Stream()
    for _ in range(3):
        for p in params:
            p.grad.mul_(1.5)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            optimizer.step()
        torch.cuda.current_stream().wait_stream(side)
        for p in alone:
            p.grad.mul_(1.5)
        expected.step()
    assert all(map(same_bits, state_of(optimizer), state_of(expected)))


@pytest.mark.parametrize("found_inf", [None, 0.0, 2.0])
def test_the_workspace_is_left_clean_cuda(found_inf):
    params = make_params()
    optimizer = LARS(groups_of(params), lr=0.5, **OPTIONS)
    if found_inf is not None:
        optimizer.found_inf = torch.tensor(found_inf, device="cuda")
    for _ in range(2):
        optimizer.step()
        (workspace,) = optimizer._stepper.workspaces.values()
        assert workspace.tensor.numel() > 0
        assert not workspace.tensor.any()


def test_a_workspace_serves_a_larger_step_after_a_smaller_cuda():
    """It grows, zeroed, if it must. A step that needs less leaves it as it is."""
    params, alone = make_params(), make_params()
    optimizer, expected = LARS(params, lr=0.5, **OPTIONS), LARS(alone, lr=0.5, **OPTIONS)
    for have_grads in (slice(0, 2), slice(0, 6), slice(1, 3)):
        for both in (params, alone):
            for p in both:
                p.grad = None
            for p in both[have_grads]:
                p.grad = torch.cos(p.detach())
        optimizer.step()
        expected._stepper.workspaces.clear()
        expected.step()
    assert all(map(same_bits, params, alone))


@pytest.mark.parametrize("only_grads", [False, True])
@pytest.mark.parametrize(
    ("dtype", "rounding"),
    [
        (torch.float32, {}),
        (torch.bfloat16, {}),
        (torch.float64, {}),
        (torch.float32, {"momentum_dtype": torch.float16}),
        (torch.float32, {"momentum_dtype": "int8"}),
        (torch.bfloat16, {"stochastic_rounding": True}),
        (torch.bfloat16, {"stochastic_rounding": True, "momentum_dtype": "int8"}),
    ],
    ids=str,
)
def test_misaligned_tensors_get_the_same_bits_cuda(dtype, rounding, only_grads):
    """The scalar path sums and updates like the vector path. DDP's bucket views misalign gradients."""

    def shifted(x):
        storage = torch.empty(x.numel() + 1, dtype=x.dtype, device="cuda")
        storage[1:].copy_(x)
        return storage[1:]

    params = make_params(dtype=dtype)
    moved = [nn.Parameter(p.detach().clone() if only_grads else shifted(p.detach())) for p in params]
    for p, m in zip(params, moved):
        m.grad = shifted(p.grad)
    optimizers = [LARS(x, lr=0.5, **OPTIONS, **rounding) for x in (params, moved)]
    for _ in range(2):
        for optimizer in optimizers:
            optimizer.step()
    assert all(map(same_bits, params, moved))


def test_lists_longer_than_a_launch_cuda():
    """3,000 tensors in 300 groups get the bits that each one gets alone."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(3000, 5, generator=generator).to("cuda")
    params = [nn.Parameter(x.clone()) for x in values]
    groups = [{"params": params[i : i + 10], "lr": 0.1 + i / 3000} for i in range(0, 3000, 10)]
    optimizer = LARS(groups, **OPTIONS)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    ratios = optimizer.trust_ratios()
    for i in (0, 9, 10, 799, 1500, 2999):
        alone = nn.Parameter(values[i].clone())
        alone.grad = torch.ones_like(alone)
        expected = LARS([alone], lr=0.1 + i // 10 * 10 / 3000, **OPTIONS)
        expected.step()
        assert same_bits(params[i], alone)
        assert same_bits(ratios[params[i]], expected.trust_ratios()[alone])


def test_one_large_tensor_cuda():
    """20 million elements differ from the CPU step only by rounding."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(20_000_003, generator=generator)
    grad = torch.randn(20_000_003, generator=generator)
    params = [nn.Parameter(weight.clone().to(device)) for device in ("cuda", "cpu")]
    for p in params:
        p.grad = grad.to(p.device)
        LARS([p], lr=0.5, momentum=0.9, weight_decay=1e-3).step()
    # q differs by the rounding of sums. Then the product and the difference are each rounded once.
    torch.testing.assert_close(params[0].cpu(), params[1], rtol=2**-22, atol=1e-9)
    assert not same_bits(params[0], weight)


@pytest.mark.parametrize("fault", ["behind an allocation", "no pointer of the device"])
def test_a_fault_in_training_surfaces_as_torch_reports_it_cuda(fault):
    """This needs its own process, because a real device stays unusable after a fault."""
    program = """
import sys
import torch
import fused_lars

numbers = {"lr": 0.5, "trust_coefficient": 0.001, "momentum": 0, "weight_decay": 0, "eps": 0, "dampening": 0}
options = {name: [value] for name, value in numbers.items()}
switches = "nesterov maximize trust_clip layer_adaptation decayed_norm".split()
switches += ["classic_momentum", "master_weights", "stochastic_rounding"]
options.update({name: [name in ("layer_adaptation", "classic_momentum")] for name in switches})

# The op alone: a workspace would lie in the memory that the tensors claim below, which is refused.
def train(steps):
    for _ in range(steps):
        torch.ops.fused_lars.step_([param.detach()], [grad], [], [], [], [], [], [1], **options)

param = torch.nn.Parameter(torch.ones(1024, device="cuda"))
grad = torch.ones_like(param)
train(2)
assert (param < 1).all()
address = param.data_ptr() if sys.argv[1] == "behind an allocation" else 4096
claimed = 1 << 32  # bytes

def tensor_at(address):
    storage = torch._C._construct_storage_from_data_pointer(address, param.device, claimed)
    return torch.empty(0, device="cuda").set_(storage, 0, (claimed // 4,))

param.data, grad = tensor_at(address), tensor_at(address + claimed)
try:
    train(1)
    torch.cuda.synchronize()
except RuntimeError as error:  # torch.AcceleratorError is one
    # What lies behind an allocation may be no global memory at all.
    faults = ("an illegal memory access", "operation not supported on global/shared address space")
    assert any(f"CUDA error: {fault}" in str(error) for fault in faults), error
    print("reported")
"""
    command = [sys.executable, "-c", program, fault]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.stdout.strip() == "reported", result.stdout + result.stderr
