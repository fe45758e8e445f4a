"""Training without Python by torch.export: AOTInductor compiles loss and gradients, Lars makes the step."""

import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import cpp_program
from fused_lars import Lars
from scripted_trainer import batches


def test_a_program_trains_what_was_exported(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 5))
    names, params = zip(*((name, p.detach()) for name, p in model.named_parameters()))

    def loss(params, x, y):
        return nn.functional.cross_entropy(
            torch.func.functional_call(model, dict(zip(names, params)), (x,)), y
        )

    def gradients_and_loss(*inputs):
        gradients, value = torch.func.grad_and_value(loss)(inputs[:-2], *inputs[-2:])
        return (*gradients, value)

    data = batches(6)
    # torch.export takes no gradients, so it is handed a graph in which they are operators like any other.
    graph = make_fx(gradients_and_loss)(*params, *data[0])
    program = torch.export.export(graph, (*params, *data[0]))
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "gradients.pt2"))
    torch.save((list(params), data), tmp_path / "run.pt")
    printed = cpp_program.run("train_exported", package, tmp_path / "run.pt", tmp_path / "trained.pt")

    optimizer = Lars(2.0).with_momentum(0.9).with_weight_decay(1e-3).with_trust_coefficient(0.02)
    losses = []
    for batch in data:
        *gradients, value = gradients_and_loss(*params, *batch)
        losses.append(value)
        optimizer.step_all(list(range(len(params))), list(params), gradients)
    torch.testing.assert_close(
        torch.tensor([float(line) for line in printed.split()]), torch.stack(losses), rtol=1e-4, atol=0.0
    )
    # Inductor's kernels round the gradients in their own way.
    for param, trained in zip(params, torch.load(tmp_path / "trained.pt", weights_only=False)):
        torch.testing.assert_close(trained, param, rtol=1e-4, atol=1e-5)
    assert not [
        name for name in cpp_program.libraries(cpp_program.path("train_exported")) if "python" in name
    ]
