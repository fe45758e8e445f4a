"""fp32 masters: a write into a parameter between steps stays, and the other elements lose nothing."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import distributed_nets as nets
from devices import has_kernels
from distributed_harness import on_ranks
from fused_lars import LARS
from fused_lars._masters import take_over
from stepping import same_bits

HALF = [torch.bfloat16, torch.float16]
OPTIONS = dict(lr=0.5, momentum=0.9, trust_coefficient=0.02, weight_decay=0.01, master_weights=True)


@pytest.fixture(params=["fused", "foreach"])
def implementation(request, device):
    if request.param == "fused" and not has_kernels(device):
        pytest.skip("the build has no CUDA kernels")
    return {request.param: True}


def make(device, dtype=torch.bfloat16, **options):
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(n, generator=generator).to(device, dtype) for n in (40, 1, 0, 130)]
    # Also a layout that differs from the master's.
    values.append(torch.randn(6, 5, generator=generator).to(device, dtype).t())
    params = [nn.Parameter(x) for x in values]
    return params, LARS(params, **{**OPTIONS, **options})


def step(optimizer, params, number):
    generator = torch.Generator().manual_seed(number)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.device, p.dtype)
    optimizer.step()


def masters(optimizer, params):
    return [optimizer.state[p]["master_param"].clone() for p in params]


def clamp(params):
    with torch.no_grad():
        for p in params:
            p.clamp_(-0.5, 0.5)


def write_one_element(params):
    with torch.no_grad():
        params[0][3] = 7.0


def write_through_a_view(params):
    params[3].detach().view(10, 13)[2:4].fill_(0.25)


def normalise(params):
    with torch.no_grad():
        params[4].copy_(nn.functional.normalize(params[4].clone(), dim=0))


def write_in_inference_mode(params):
    with torch.inference_mode():
        params[0].mul_(2)


def set_data(params):
    params[0].data = params[0].data * 2


def set_a_vector(params):
    vector_to_parameters(parameters_to_vector(params[:4]) * 2, params[:4])


WRITES = [
    clamp,
    write_one_element,
    write_through_a_view,
    normalise,
    write_in_inference_mode,
    set_data,
    set_a_vector,
]
writes = pytest.mark.parametrize("write", WRITES, ids=lambda f: f.__name__)


@writes
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_write_between_steps_stays(write, dtype, implementation, device):
    """The steps are those of fp32 parameters in which exactly the written elements change."""
    params, optimizer = make(device, dtype, **implementation)
    twins = [nn.Parameter(p.detach().float()) for p in params]
    expected = LARS(twins, **{**OPTIONS, **implementation})
    for number in range(4):
        if number > 0:
            write(params)
            written = [twin.detach().to(dtype) != p.detach() for p, twin in zip(params, twins)]
            assert any(bool(w.any()) for w in written)
            for p, twin, w in zip(params, twins, written):
                twin.data[w] = p.detach()[w].float()
        step(optimizer, params, number)
        for p, twin in zip(params, twins):
            twin.grad = p.grad.float()
        expected.step()
        for p, twin in zip(params, twins):
            assert same_bits(optimizer.state[p]["master_param"], twin)
            assert same_bits(p, twin.to(dtype))
    # There are low bits that could be lost.
    assert not torch.equal(twins[0], twins[0].to(dtype).float())


def test_a_clamped_parameter_stays_clamped(implementation, device):
    p = nn.Parameter(torch.full((4,), 4.5, dtype=torch.bfloat16, device=device))
    optimizer = LARS([p], lr=1.0, layer_adaptation=False, master_weights=True, **implementation)
    for _ in range(200):
        p.grad = torch.full_like(p, -0.02)
        optimizer.step()
        with torch.no_grad():
            p.clamp_(max=4.59375)
    assert p.eq(4.59375).all()
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert p.eq(4.59375).all()


def test_nothing_is_lost_where_nothing_was_written(implementation, device):
    """Neither a run that reads and copies parameters loses bits, nor a write that leaves values unchanged."""
    params, optimizer = make(device, **implementation)
    twins, expected = make(device, **implementation)
    for number in range(6):
        step(optimizer, params, number)
        step(expected, twins, number)
        with torch.no_grad():
            for p in params:
                p.copy_(p.clone())
                p.mul_(2).mul_(0.5)
    assert all(map(same_bits, masters(optimizer, params), masters(expected, twins)))


def test_values_are_compared_after_a_write_only(device, monkeypatch):
    """A usual step compares only versions. After a write into one parameter, only its values are compared."""
    import fused_lars._masters

    compared = []
    take_over = fused_lars._masters.take_over
    monkeypatch.setattr(
        fused_lars._masters, "take_over", lambda p, m: (compared.append(p.shape), take_over(p, m))
    )
    params, optimizer = make(device)
    optimizer.add_param_group(
        {"params": [nn.Parameter(torch.ones(3, device=device))], "master_weights": False}
    )
    step(optimizer, params, 0)
    compared.clear()
    for number in range(1, 3):
        step(optimizer, params, number)
    assert compared == []
    clamp(params[:1])
    step(optimizer, params, 3)
    assert compared == [params[0].shape]
    step(optimizer, params[1:], 4)  # the first parameter keeps its gradient
    params[0].grad = None
    step(optimizer, params[1:], 5)
    assert compared == [params[0].shape]


def test_loaded_weights_are_taken(implementation, device):
    """Also after a step. A run that goes on from a checkpoint equals the run that was not interrupted."""
    params, optimizer = make(device, **implementation)
    for number in range(3):
        step(optimizer, params, number)
    weights = [p.detach().clone() for p in params]
    state = copy.deepcopy(optimizer.state_dict())
    for number in range(3, 5):
        step(optimizer, params, number)
    uninterrupted = [p.detach().clone() for p in params]
    for order in (["weights", "state"], ["state", "weights"]):
        for what in order:
            if what == "state":
                optimizer.load_state_dict(copy.deepcopy(state))
                continue
            with torch.no_grad():
                for p, x in zip(params, weights):
                    p.copy_(x)
        for number in range(3, 5):
            step(optimizer, params, number)
        assert all(map(same_bits, params, uninterrupted)), order
    with torch.no_grad():
        for p, x in zip(params, weights):
            p.copy_(x)
    optimizer.param_groups[0].update(lr=0.0, momentum=0.0)
    step(optimizer, params, 5)
    assert all(map(same_bits, params, weights))


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x)), copy.copy],
    ids=["deep", "pickle", "copy"],
)
def test_copies_take_what_was_written(duplicate, device):
    params, optimizer = make(device)
    twins, expected = make(device)
    for number in range(2):
        step(optimizer, params, number)
        step(expected, twins, number)
    clamp(twins)
    optimizer = duplicate(optimizer)
    params = optimizer.param_groups[0]["params"]
    clamp(params)
    for number in range(2, 4):
        step(optimizer, params, number)
        step(expected, twins, number)
    assert all(map(same_bits, masters(optimizer, params), masters(expected, twins)))


def test_a_parameter_that_was_fp32_for_a_while(device):
    """Its master is from before that time, so the parameter counts."""
    model = nn.Linear(3, 2).to(device, torch.bfloat16)
    params = list(model.parameters())
    optimizer = LARS(params, lr=1.0, trust_coefficient=0.2, master_weights=True)
    step(optimizer, params, 0)
    model.float()
    for number in range(5):
        step(optimizer, params, number)
    model.bfloat16()
    before = [p.detach().clone() for p in params]
    optimizer.param_groups[0]["lr"] = 0.0
    step(optimizer, params, 5)
    assert all(map(same_bits, params, before))


def test_nan_and_signed_zero(device):
    """Bits are compared: -0 differs from 0, and a NaN that was not written stays as it is."""
    old = torch.tensor([1.0001, 0.0, 2.0001, torch.nan, torch.inf, -0.0], device=device)
    param = torch.tensor([1.0, -0.0, torch.nan, 3.0, 4.0, 0.0], dtype=torch.bfloat16, device=device)
    master = old.clone()
    take_over(param, master)
    expected = torch.tensor([1.0001, -0.0, torch.nan, 3.0, 4.0, 0.0], device=device)
    assert same_bits(master, expected)
    take_over(old.bfloat16(), old_master := old.clone())
    assert same_bits(old_master, old)


def test_tensors_of_inference_mode():
    """They have no version, so every step compares their values."""
    with torch.inference_mode():
        p = torch.full((3,), 1.0, dtype=torch.bfloat16)
        optimizer = LARS([p], lr=1.0, layer_adaptation=False, master_weights=True)
        p.grad = torch.full_like(p, 2**-10)  # a quarter of the last place
        for _ in range(6):
            optimizer.step()
        assert p.eq(1 - 6 * 2**-10).all() or p.lt(1).all()
        p.fill_(5.0)
        optimizer.step()
        assert p.eq(5.0).all()


def test_autograd_follows_what_was_written():
    """differentiable=True: a clamp between two steps is part of the graph."""
    start = torch.linspace(1, 2, 5, requires_grad=True)
    p = start.bfloat16()
    optimizer = LARS([p], lr=1.0, layer_adaptation=False, master_weights=True, differentiable=True)
    p.grad = torch.full_like(p, 0.25)
    optimizer.step()
    p.mul_(3)
    optimizer.step()
    p.sum().backward()
    assert torch.equal(start.grad, torch.full_like(start, 3.0))


@pytest.mark.parametrize("write", [clamp, set_data], ids=["clamp", "set_data"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_steps(backend, write):
    params, optimizer = make("cpu")
    twins, expected = make("cpu")
    compiled = torch.compile(optimizer.step, backend=backend)
    for number in range(4):
        step(expected, twins, number)
        for p, twin in zip(params, twins):
            p.grad = twin.grad.clone()
        compiled()
        assert all(map(same_bits, masters(optimizer, params), masters(expected, twins)))
        write(params)
        write(twins)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch.cuda is not available")
def test_replays_of_a_captured_step_cuda():
    """A replay runs no host code, so the kernel itself compares values."""
    params, optimizer = make("cuda", capturable=True)
    twins, expected = make("cuda")
    for p, twin in zip(params, twins):
        p.grad, twin.grad = (torch.full_like(p, 0.1) for _ in range(2))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    expected.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for _ in range(3):
        graph.replay()
        expected.step()
        clamp(params)
        clamp(twins)
    assert all(map(same_bits, masters(optimizer, params), masters(expected, twins)))


@on_ranks(2, 4)
@pytest.mark.parametrize("through", ["DTensor", "local tensor"])
def test_sharded_parameters(through):
    """The step's norms are also those of what was written."""
    reference, model = nets.make_net(torch.bfloat16), fully_shard(nets.make_net(torch.bfloat16))
    optimizers = [nets.make_optimizer(net, master_weights=True) for net in (reference, model)]
    for x, y in nets.batches(6):
        nets.loss_of(model, x.bfloat16(), y.bfloat16(), nets.all_ranks()).backward()
        for p, q in zip(model.parameters(), reference.parameters()):
            q.grad = nets.full(p.grad)
        for optimizer in optimizers:
            optimizer.step()
        for p, q in zip(model.parameters(), reference.parameters()):
            master, expected = (o.state[t]["master_param"] for o, t in zip(optimizers, (q, p)))
            torch.testing.assert_close(nets.full(expected), master, rtol=1e-5, atol=1e-6)
            with torch.no_grad():
                # No later step could produce these values by itself.
                (p if through == "DTensor" else p.to_local()).mul_(1.5)
                q.mul_(1.5)


def test_masters_that_do_not_fit_are_named():
    params, optimizer = make("cpu")
    step(optimizer, params, 0)
    clamp(params)
    optimizer.state[params[0]]["master_param"] = torch.ones(41)
    with pytest.raises(ValueError, match=r"master_params\[0\] has shape \[41\]"):
        step(optimizer, params, 1)
    optimizer.state[params[0]]["master_param"] = torch.ones(40, device="meta")
    with pytest.raises(ValueError, match=r"master_params\[0\] is on meta"):
        step(optimizer, params, 1)
