"""Saves what train.cpp needs: a network that trains itself, as TorchScript, and handwritten digits.

python make_model.py model.pt digits.pt
"""

import sys

import sklearn.datasets
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fused_lars


class Digits(nn.Module):
    """A small convolutional network with the optimizer of its weights, which is saved with it."""

    optimizer: torch.classes.fused_lars.Lars

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.second = nn.Conv2d(16, 32, 3, padding=1, stride=2, bias=False)
        self.output = nn.Linear(512, 10, bias=False)
        self.optimizer = (
            fused_lars.Lars(1.0).with_momentum(0.9).with_weight_decay(1e-4).with_trust_coefficient(0.02)
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.output(self.second(self.first(images).relu()).relu().flatten(1))

    @torch.jit.export
    def train_step(self, images: Tensor, labels: Tensor) -> Tensor:
        """Makes one step and returns the loss before it."""
        loss = cross_entropy(self(images), labels)
        weights = [self.first.weight, self.second.weight, self.output.weight]
        grads: list[Tensor] = []
        for grad in torch.autograd.grad([loss], weights):
            assert grad is not None
            grads.append(grad)
        self.optimizer.step_all([0, 1, 2], weights, grads)
        return loss.detach()


def main(model_path, digits_path):
    torch.manual_seed(0)
    torch.jit.script(Digits()).save(model_path)
    images, labels = sklearn.datasets.load_digits(return_X_y=True)
    images = torch.tensor(images / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)
    torch.save((images, torch.tensor(labels)), digits_path)
    print(f"saved {model_path} and {digits_path}, {len(labels)} images")


if __name__ == "__main__":
    main(*sys.argv[1:])
