"""A model that trains itself. Tests script it, save it, and load it in a new Python and in C++."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import fused_lars


class Trainer(torch.nn.Module):
    optimizer: torch.classes.fused_lars.Lars

    def __init__(self, device: str = "cpu"):
        super().__init__()
        torch.manual_seed(0)
        self.hidden = torch.nn.Linear(12, 32)
        self.output = torch.nn.Linear(32, 5)
        self.to(device)
        self.optimizer = (
            fused_lars.Lars(2.0)
            .with_momentum(0.9)
            .with_weight_decay(1e-3)
            .with_trust_coefficient(0.02)
            .with_decayed_norm(True)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.hidden(x).relu())

    @torch.jit.export
    def train_step(self, x: Tensor, y: Tensor) -> Tensor:
        """One fused step of all parameters."""
        loss = cross_entropy(self(x), y)
        weights = [self.hidden.weight, self.hidden.bias, self.output.weight, self.output.bias]
        grads: list[Tensor] = []
        for grad in torch.autograd.grad([loss], weights):
            assert grad is not None
            grads.append(grad)
        self.optimizer.step_all([0, 1, 2, 3], weights, grads)
        return loss.detach()

    @torch.jit.export
    def train_step_by_node(self, x: Tensor, y: Tensor) -> Tensor:
        """The same step, one parameter at a time."""
        loss = cross_entropy(self(x), y)
        loss.backward()
        graph = [self.hidden.weight, self.hidden.bias, self.output.weight, self.output.bias]
        for node in range(len(graph)):
            self.optimizer.step_graph_node(graph, node)
        for leaf in graph:
            # Not before backward, because TorchScript then takes a missing gradient for a tensor.
            grad = leaf.grad
            assert grad is not None
            grad.zero_()
        return loss.detach()


def batches(count: int, device: str = "cpu") -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(16, 12, generator=generator).to(device),
            torch.randint(5, (16,), generator=generator).to(device),
        )
        for _ in range(count)
    ]
