"""The ops and the optimizer in torch.library.opcheck, torch.compile and torch.export."""

import functools
import io

import pytest
import torch
from torch.nn.functional import mse_loss

import fused_lars
from fused_lars import LARS

OPS = torch.ops.fused_lars
OPTIONS = {
    "momentum": [0.9, 0.0],
    "weight_decay": [0.1, 0.0],
    "trust_coefficient": [0.02, 0.001],
    "eps": [0.0, 1e-8],
    "dampening": [0.25, 0.0],
    "nesterov": [False, False],
    "maximize": [False, True],
    "trust_clip": [False, True],
    "layer_adaptation": [True, True],
    "decayed_norm": [True, False],
    "classic_momentum": [False, True],
    "master_weights": [True, False],
    "stochastic_rounding": [False, True],
}
LR = [0.5, 0.25]


@functools.cache
def inductor_runs_on(device: str) -> bool:
    """On a GPU, Inductor needs Triton, and a driver that loads what Triton compiles."""
    try:
        torch.compile(torch.sin, backend="inductor")(torch.ones(2, device=device))
    except Exception:
        return False
    return True


@pytest.fixture(params=["aot_eager", "inductor"])
def backend(request, device) -> str:
    if request.param == "inductor" and device != "cpu" and not inductor_runs_on(device):
        pytest.skip("torch.compile makes no kernels for this device")
    return request.param


def step_arguments(device, requires_grad=False):
    """Two groups of a step: an fp32 and a bf16 parameter with every kind of state, and one with none.

    The fp32 one has an int8 buffer. The last one is bf16 and rounded stochastically.
    """

    def tensor(*shape, dtype=torch.float32):
        return torch.randn(shape, generator=generator).to(device, dtype)

    generator = torch.Generator().manual_seed(0)
    params = [tensor(5, 30), tensor(4, dtype=torch.bfloat16), tensor(7, dtype=torch.bfloat16)]
    grads = [torch.ones_like(p) for p in params]
    for p in params:
        p.requires_grad_(requires_grad)
    buffers = [(40 * tensor(5, 30)).clamp(-127, 127).to(torch.int8), tensor(4)]
    masters = [params[1].detach().float()]
    steps = [torch.zeros((), device=device) for _ in range(2)]
    scales = [torch.rand(2, generator=generator).to(device)]
    rng_states = [torch.tensor([5 << 32 | i, 0, 3 * i], device=device) for i in range(2)]
    return params, grads, buffers, masters, steps, scales, rng_states, [2, 1]


def optional_arguments(device):
    return {
        "squared_norms": torch.rand(3, 2, dtype=torch.float64).to(device),
        "grad_scale": torch.tensor(4.0, device=device),
        "found_inf": torch.tensor(0.0, device=device),
        "trust_ratios": torch.zeros(3, dtype=torch.float64, device=device),
        "layer_norms": torch.zeros(3, 2, dtype=torch.float64, device=device),
        # It is large enough, because a traced program cannot see its own scratch resized.
        "workspace": torch.zeros(4096, dtype=torch.int32, device=device),
    }


def every_op(device):
    lr_tensors = [torch.tensor(lr, device=device) for lr in LR]
    for name in ("step_", "reference_step_", "check_step"):
        op = getattr(OPS, name)
        yield op.default, step_arguments(device), {"lr": LR, **OPTIONS}
        yield op.default, step_arguments(device), {"lr": LR, **OPTIONS, **optional_arguments(device)}
        yield op.tensor_lr, step_arguments(device), {"lr": lr_tensors, **OPTIONS}
    # Autograd follows the reference, and does not allow a leaf to change in place.
    yield OPS.step_.default, step_arguments(device, requires_grad=True), {"lr": LR, **OPTIONS}
    params, grads, *_ = step_arguments(device)
    yield OPS.squared_norms.default, (params, grads), {}
    workspace = optional_arguments(device)["workspace"]
    grad_scale = optional_arguments(device)["grad_scale"]
    for scale in (None, grad_scale):
        options = {"weight_decay": [0.5, 0.0], "maximize": [True, False], "decayed_norm": [True, False]}
        options.update(grad_scale=scale, workspace=workspace)
        yield OPS.squared_norms.groups, (params, grads, [2, 1]), options
    momentum = torch.randn(5, 30).to(device)
    yield OPS.encode_momentum.default, (momentum,), {}
    yield OPS.decode_momentum.default, OPS.encode_momentum(momentum), {}
    numbers = 1.0, 0.9, 0.0, 0.001, 0.0, 0.0
    switches = False, False, False, True, False, True, False, False
    yield OPS.check_hyperparameters.default, (*numbers, *switches), {}


def test_opcheck(device):
    checked = set()
    for op, args, kwargs in every_op(device):
        torch.library.opcheck(op, args, kwargs)
        checked.add(op.name())
    registered = {n for n in torch._C._dispatch_get_all_op_names() if n.startswith("fused_lars::")}
    # config takes nothing and returns the build's description, so there is nothing to trace.
    assert checked == registered - {"fused_lars::config"}


def mutated(args) -> list[torch.Tensor]:
    params, _, *state, _ = args
    return [tensor for tensors in (params, *state) for tensor in tensors]


def assert_same(got: list[torch.Tensor], expected: list[torch.Tensor]):
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def test_a_step_compiles_to_one_graph(device, backend):
    def step(params, grads, buffers, masters, steps, scales, rng_states, sizes):
        norms = OPS.squared_norms(params, grads)
        state = buffers, masters, steps, scales, rng_states
        OPS.step_(params, grads, *state, sizes, lr=LR, **OPTIONS, squared_norms=norms)
        return params[0] * 2

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    got, expected = step_arguments(device), step_arguments(device)
    for _ in range(2):
        assert_same([compiled(*got)], [step(*expected)])
    assert_same(mutated(got), mutated(expected))


class Step(torch.nn.Module):
    def forward(self, params, grads, buffers, masters, steps, scales, rng_states, lr):
        state = buffers, masters, steps, scales, rng_states
        OPS.step_.tensor_lr(params, grads, *state, [2, 1], lr=lr, **OPTIONS)


@pytest.mark.parametrize("strict", [False, True])
def test_a_step_exports(device, strict):
    def arguments():
        *tensors, _ = step_arguments(device)
        return (*tensors, [torch.tensor(lr, device=device) for lr in LR])

    program = torch.export.export(Step(), arguments(), strict=strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    programs = {
        "exported": program,
        "decomposed": program.run_decompositions(),
        "loaded": torch.export.load(file),
    }
    expected = arguments()
    Step()(*expected)
    expected[-1][0].fill_(0.125)
    Step()(*expected)
    for program in programs.values():
        got, module = arguments(), program.module()
        module(*got)
        got[-1][0].fill_(0.125)  # lr is an input of the program, not a constant
        module(*got)
        assert_same([t for list_ in got for t in list_], [t for list_ in expected for t in list_])


def make_training(device, **options):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 2)).to(device)
    groups = fused_lars.param_groups(model, weight_decay=1e-3)
    return model, LARS(groups, lr=1.0, momentum=0.9, trust_coefficient=0.02, **options)


def batches(device):
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        x = torch.randn(8, 6, generator=generator).to(device)
        yield x, x[:, :2].sin()


def test_a_whole_training_step_compiles(device, backend):
    def make_step(model, optimizer):
        def step(x, y):
            loss = mse_loss(model(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach()

        return step

    model, optimizer = make_training(device)
    compiled_model, compiled_optimizer = make_training(device)
    eager, compiled = (
        make_step(model, optimizer),
        torch.compile(make_step(compiled_model, compiled_optimizer), backend=backend),
    )
    for x, y in batches(device):
        # Inductor's own kernels for the model may round differently. With equal gradients the step may not.
        torch.testing.assert_close(compiled(x, y), eager(x, y), rtol=1e-5, atol=1e-6)
    for p, q in zip(model.parameters(), compiled_model.parameters()):
        torch.testing.assert_close(q, p, rtol=1e-5, atol=1e-6)
    assert len(compiled_optimizer.state) == len(optimizer.state)


@pytest.mark.parametrize("options", [{}, {"nesterov": True}, {"lr": "tensor"}, {"foreach": True}], ids=str)
def test_a_compiled_optimizer_gives_the_eager_bits(device, backend, options):
    if options.get("lr") == "tensor":
        options = {"lr": torch.tensor(1.0, device=device)}
    model, optimizer = make_training(device)
    compiled_model, compiled_optimizer = make_training(device)
    for o in (optimizer, compiled_optimizer):
        for group in o.param_groups:
            group.update({k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in options.items()})
    compiled = torch.compile(compiled_optimizer.step, backend=backend)
    for x, y in batches(device):
        for m in (model, compiled_model):
            mse_loss(m(x), y).backward()
        optimizer.step()
        compiled()
        for o in (optimizer, compiled_optimizer):
            o.zero_grad()
            for group in o.param_groups:
                group["lr"] *= 0.5  # a schedule, in place if lr is a tensor
        for p, q in zip(model.parameters(), compiled_model.parameters()):
            if options.get("foreach") and backend == "inductor":
                torch.testing.assert_close(p, q)  # Inductor has kernels of its own
            else:
                assert torch.equal(p, q)


class Counter:
    """A backend that counts the graphs with operators that it gets. From 2.15 on, torch drops the others."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += any(node.op.startswith("call") for node in graph.graph.nodes)
        return graph.forward


# Once a number other than lr has changed, a step of ordinary operators is no longer traced.
@pytest.mark.parametrize("changes", [["lr"], ["lr", "momentum"]], ids=str)
@pytest.mark.parametrize("implementation", ["fused", "foreach"])
def test_a_schedule_does_not_compile_anew_in_every_step(device, implementation, changes):
    """At most as often as torch's SGD, whose learning rate is a float too."""
    graphs, results = {}, []
    for optimizer_class, compiled in ((LARS, True), (LARS, False), (torch.optim.SGD, True)):
        torch._dynamo.reset()
        params = [torch.nn.Parameter(torch.ones(3, device=device)) for _ in range(2)]
        optimizer = optimizer_class(params, lr=1.0, momentum=0.9, **{implementation: True})
        counter = Counter()
        step = torch.compile(optimizer.step, backend=counter) if compiled else optimizer.step
        for i in range(14):
            for p in params:
                p.grad = torch.ones_like(p)
            for change in changes:
                optimizer.param_groups[0][change] = {"lr": 1.0, "momentum": 0.9}[change] / (1 + i)
            step()
        graphs[optimizer_class, compiled] = counter.graphs
        results.append(params)
    assert graphs[LARS, True] <= graphs[torch.optim.SGD, True]
    for p, q in zip(*results[:2]):
        torch.testing.assert_close(p, q)
