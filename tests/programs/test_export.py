"""Training without Python by torch.export. AOTInductor compiles loss and gradients, or the whole step."""

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import cpp_program
from fused_lars import Lars
from scripted_trainer import batches

OPS = torch.ops.fused_lars
OPTIONS = {
    "momentum": [0.9],
    "weight_decay": [1e-3],
    "trust_coefficient": [0.02],
    "eps": [0.0],
    "dampening": [0.0],
    "nesterov": [False],
    "maximize": [False],
    "trust_clip": [False],
    "layer_adaptation": [True],
    "decayed_norm": [True],
    "classic_momentum": [True],
    "master_weights": [False],
    "stochastic_rounding": [False],
}


def make_model():
    """Returns a model's parameters, and its loss as a function of them and a batch."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 5))
    names, params = zip(*((name, p.detach()) for name, p in model.named_parameters()))

    def loss(params, x, y):
        return nn.functional.cross_entropy(
            torch.func.functional_call(model, dict(zip(names, params)), (x,)), y
        )

    return list(params), loss


def compile_package(function, inputs, path) -> str:
    # torch.export does not take gradients, so it gets a graph in which they are ordinary operators.
    inputs = [tensor.clone() for tensor in inputs]
    program = torch.export.export(make_fx(function)(*inputs), tuple(inputs))
    return torch._inductor.aoti_compile_and_package(program, package_path=str(path))


def assert_close(printed: str, losses, trained, params):
    """Inductor's kernels round gradients differently."""
    torch.testing.assert_close(
        torch.tensor([float(line) for line in printed.split()]), torch.stack(losses), rtol=1e-4, atol=0.0
    )
    for param, other in zip(params, torch.load(trained, weights_only=False), strict=True):
        torch.testing.assert_close(other, param, rtol=1e-4, atol=1e-5)


def test_a_program_trains_what_was_exported(tmp_path):
    params, loss = make_model()

    def gradients_and_loss(*inputs):
        gradients, value = torch.func.grad_and_value(loss)(inputs[:-2], *inputs[-2:])
        return (*gradients, value)

    data = batches(6)
    package = compile_package(gradients_and_loss, [*params, *data[0]], tmp_path / "gradients.pt2")
    torch.save((params, data), tmp_path / "run.pt")
    printed = cpp_program.run("train_exported", package, tmp_path / "run.pt", tmp_path / "trained.pt")

    optimizer = Lars(2.0).with_momentum(0.9).with_weight_decay(1e-3).with_trust_coefficient(0.02)
    losses = []
    for batch in data:
        *gradients, value = gradients_and_loss(*params, *batch)
        losses.append(value)
        optimizer.step_all(list(range(len(params))), params, gradients)
    assert_close(printed, losses, tmp_path / "trained.pt", params)
    assert not [
        name for name in cpp_program.libraries(cpp_program.path("train_exported")) if "python" in name
    ]


def training_step(loss, count, op):
    """A function of parameters, momentum buffers, a batch and lr.

    It updates the first two and returns the loss.
    """

    def step(*inputs):
        params, buffers, (x, y, lr) = inputs[:count], inputs[count : 2 * count], inputs[2 * count :]
        gradients, value = torch.func.grad_and_value(loss)(params, x, y)
        # fp32 parameters have no masters and, without dampening, no step counts. Nothing is rounded. So these
        # lists are empty.
        op(list(params), list(gradients), list(buffers), [], [], [], [], [count], lr=[lr], **OPTIONS)
        return value

    return step


@pytest.mark.parametrize("op", ["step_", "reference_step_"])
def test_a_package_holds_the_whole_training_step(op, tmp_path):
    params, loss = make_model()
    step = training_step(loss, len(params), getattr(OPS, op).tensor_lr)
    buffers, data = [torch.zeros_like(p) for p in params], batches(6)
    lr = torch.tensor(2.0, dtype=torch.float64)
    package = compile_package(step, [*params, *buffers, *data[0], lr], tmp_path / "step.pt2")
    torch.save((params, data), tmp_path / "run.pt")
    printed = cpp_program.run("train_packaged", package, tmp_path / "run.pt", tmp_path / "trained.pt")

    losses = []
    for batch in data:
        losses.append(step(*params, *buffers, *batch, lr))
        lr *= 0.5
    assert_close(printed, losses, tmp_path / "trained.pt", params)


# ---------------------------------------------------------------- inside of torch.func.grad
# There, tensors are wrapped and have no storage that can be checked.


@pytest.mark.parametrize(
    "view", [lambda x: x, lambda x: x[:, ::2], lambda x: x.t()], ids=["all", "columns", "t"]
)
def test_gradients_through_a_step(view):
    weight, grad = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)

    def loss(weight, grad):
        stepped, buffer = weight.clone(), torch.zeros_like(weight)
        tensors = [view(stepped)], [view(grad)], [view(buffer)]
        OPS.reference_step_(*tensors, [], [], [], [], [1], lr=[0.5], **OPTIONS)
        return stepped.square().sum()

    leaf = weight.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf, grad), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(weight, grad), expected)
    for mode in ("real", "fake", "symbolic"):
        graph = make_fx(torch.func.grad(loss), tracing_mode=mode)(weight, grad)
        torch.testing.assert_close(graph(weight, grad), expected)


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("op", ["step_", "reference_step_"])
def test_a_training_step_is_traced(op, mode):
    params, loss = make_model()
    step = training_step(loss, len(params), getattr(OPS, op).tensor_lr)
    inputs = [*params, *map(torch.zeros_like, params), *batches(1)[0], torch.tensor(2.0)]

    def copies():
        return [tensor.clone() for tensor in inputs]

    graph, expected = make_fx(step, tracing_mode=mode)(*copies()), copies()
    program = torch.export.export(graph, tuple(copies())).module()
    value = step(*expected)
    for function in (graph, program):
        got = copies()
        assert torch.equal(function(*got), value)
        assert all(torch.equal(a, b) for a, b in zip(got, expected))
