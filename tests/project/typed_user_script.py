"""The documentation's examples as a user's program with types. `make lint` checks it with mypy and pyright.

Type checkers must see nothing here as Any. test_typing.py runs the program.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import StepLR
from typing_extensions import assert_type

import fused_lars
from fused_lars import LARS, Lars


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def make_batch() -> tuple[Tensor, Tensor]:
    return torch.randn(16, 6), torch.randint(3, (16,))


def train_with_the_optimizer() -> None:
    model = make_model()
    inputs, targets = make_batch()
    groups = fused_lars.param_groups(model, weight_decay=5e-5, exclude=lambda name, param: "head" in name)
    optimizer = LARS(groups, lr=10.5, momentum=0.9, layer_adaptation="decayed")
    scheduler = StepLR(optimizer, step_size=1)
    cross_entropy(model(inputs), targets).backward()
    assert_type(optimizer.step(), None)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(model(inputs), targets)
        loss.backward()
        return loss

    assert_type(optimizer.step(closure), Tensor)
    scheduler.step()

    assert_type(optimizer.trust_ratios(), dict[Tensor, Tensor])
    assert_type(optimizer.trust_ratios(as_numbers=True), dict[Tensor, float])
    assert_type(optimizer.trust_ratios(by_name=True), dict[str, Tensor])
    assert_type(optimizer.trust_ratios(by_name=True, as_numbers=True), dict[str, float])
    weight = next(model.parameters())
    assert_type(optimizer.layer_norms()[weight].grad, Tensor)
    assert_type(optimizer.layer_norms(as_numbers=True)[weight].grad, float)
    assert_type(optimizer.layer_norms(by_name=True)["0.weight"].weight, Tensor)
    assert_type(optimizer.layer_norms(by_name=True, as_numbers=True)["0.weight"].weight, float)

    state = optimizer.state_dict()
    again = LARS(fused_lars.param_groups([model], named=False), lr=torch.tensor(0.1))
    again.add_param_group({"params": [nn.Parameter(torch.ones(2))], "weight_decay": 0.0})
    LARS(model.named_parameters(), fused=True).load_state_dict(LARS(model.parameters()).state_dict())
    assert_type(state, dict[str, Any])


def take_a_run_over() -> None:
    model = make_model()
    inputs, targets = make_batch()
    theirs = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    cross_entropy(model(inputs), targets).backward()
    theirs.step()
    ours = LARS(fused_lars.param_groups([model]), momentum=0.9, classic_momentum=False)
    ours.load_state_dict(fused_lars.convert_state_dict(theirs.state_dict(), ours, "sgd", model.parameters()))
    fused_lars.convert_state_dict(theirs.state_dict(), ours, "sgd", model.named_parameters())


def train_by_id() -> None:
    weight, bias, grad = torch.ones(3, 2), torch.ones(2), torch.ones(3, 2)
    optimizer = fused_lars.Lars(0.1).with_momentum(0.9).with_weight_decay(5e-4)
    assert_type(optimizer.with_trust_coefficient(0.02).with_decayed_norm(True), Lars)
    optimizer.step(0, weight, grad)
    optimizer.step_all([0, 1], [weight, bias], [grad, torch.ones(2)])
    leaf = torch.ones(2, requires_grad=True)
    leaf.sum().backward()
    optimizer.step_graph_node([weight, bias, leaf], node=2)
    optimizer.set_learning_rate(0.5 * assert_type(optimizer.learning_rate(), float))
    optimizer.clear_state()


class Trainer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.optimizer = fused_lars.Lars(0.1).with_momentum(0.9)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)

    @torch.jit.export
    def train_step(self, x: Tensor, y: Tensor) -> Tensor:
        loss = cross_entropy(self.forward(x), y)
        weights = [self.layer.weight, self.layer.bias]
        grads: list[Tensor] = []
        for grad in torch.autograd.grad([loss], weights):
            assert grad is not None
            grads.append(grad)
        self.optimizer.step_all([0, 1], weights, grads)
        return loss.detach()


def train_in_torchscript() -> None:
    scripted = torch.jit.script(Trainer())
    scripted.train_step(*make_batch())
    with tempfile.TemporaryDirectory() as folder:
        scripted.save(str(Path(folder, "trainer.pt")))
        optimizer = torch.jit.load(str(Path(folder, "trainer.pt"))).optimizer
    assert isinstance(optimizer, Lars)
    assert_type(optimizer, Lars)


def what_the_package_says() -> None:
    print(assert_type(fused_lars.show_config(), str))
    print(assert_type(fused_lars.__version__, str), assert_type(fused_lars.cmake_prefix_path, str))
    weight = torch.ones(3)
    norms = fused_lars.ops.squared_norms([weight], [weight])
    print(norms)


def make_mistakes() -> None:
    """Type checkers refuse each of these. If one did not, its unused mark would be an error."""
    ours = LARS(make_model().parameters())
    mistakes: list[Callable[[], object]] = [
        lambda: LARS(3),  # type: ignore[arg-type]
        lambda: LARS(make_model().parameters(), momentum="0.9"),  # type: ignore[arg-type]
        lambda: LARS(make_model().parameters(), layer_adaptation="all"),  # type: ignore[arg-type]
        lambda: ours.step(3),  # type: ignore[call-overload]
        lambda: ours.trust_ratios(True),  # type: ignore[call-overload]
        lambda: fused_lars.param_groups(3),  # type: ignore[arg-type]
        lambda: fused_lars.convert_state_dict(ours.state_dict(), ours, "adam"),  # type: ignore[arg-type]
        lambda: Lars("0.1"),  # type: ignore[arg-type]
        lambda: Lars(0.1).with_learning_rate(0.2),  # type: ignore[attr-defined]
    ]
    for mistake in mistakes:
        try:
            mistake()
        except (AttributeError, RuntimeError, TypeError, ValueError):
            continue
        raise AssertionError(f"{mistake} is no mistake")


if __name__ == "__main__":
    train_with_the_optimizer()
    take_a_run_over()
    train_by_id()
    train_in_torchscript()
    what_the_package_says()
    make_mistakes()
