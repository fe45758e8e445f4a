"""``fused_lars.Lars``: LARS with its state kept under parameter ids, in eager code and in TorchScript."""

import copyreg
from typing import Any

import torch
from torch import Tensor

from . import _library  # noqa: F401  registers torch.classes.fused_lars
from ._torch_internals import script_class_name

__all__ = ["Lars"]

_NAME = "__torch__.torch.classes.fused_lars.Lars"


def _is_lars(instance: object) -> bool:
    return isinstance(instance, torch.ScriptObject) and script_class_name(instance) == _NAME


class _ScriptClass(type):
    # An object of a TorchScript class is a torch.ScriptObject, and the class itself is not a Python type.
    def __instancecheck__(cls, instance: object) -> bool:
        return _is_lars(instance)


class Lars(metaclass=_ScriptClass):
    r"""LARS whose state is kept under parameter ids that the caller chooses.

    It is for programs without a ``torch.optim.Optimizer``: TorchScript, and programs that keep their own list
    of parameters. The rule is that of :class:`fused_lars.LARS` with ``classic_momentum=True`` (You, Gitman
    and Ginsburg 2017, algorithm 1). The fused kernels compute it.

    ``Lars(base_lr)`` makes an object of the TorchScript class ``torch.classes.fused_lars.Lars``. Code for
    ``torch.jit.script`` uses that name, for the constructor and in annotations. The C++ class is
    ``fused_lars::Lars``.

    Args:
        base_lr (float): learning rate, finite and >= 0.

    Copies and storage: ``copy.deepcopy`` and ``pickle`` copy the settings and the buffers, and a scripted
    module that holds the object saves them with itself. ``copy.copy`` gives a second name for the same
    optimizer. Import ``fused_lars`` before ``torch.jit.load`` and ``torch.load``. ``torch.load`` then needs
    no ``weights_only=False``.

    Raises:
        ValueError: by every method, for a value out of range, tensors that do not fit together, repeated ids,
            a node outside the graph, or a node that requires grad and has no gradient. Nothing has changed
            then. In scripted code the TorchScript interpreter replaces it by a RuntimeError with the same
            text, as it does for every operator.

    Example:
        >>> optimizer = fused_lars.Lars(0.1).with_momentum(0.9).with_weight_decay(5e-4)
        >>> optimizer.step(0, weight, weight_grad)
        >>> optimizer.step_all([0, 1], [weight, bias], [weight_grad, bias_grad])
    """

    def __new__(cls, base_lr: float) -> "Lars":
        return torch.classes.fused_lars.Lars(base_lr)

    # Type checkers, help() and the API page see these declarations. At run time `self` is a
    # torch.ScriptObject, whose methods are those of csrc/torchbind.cpp. So each call below reaches C++, not
    # itself.

    def with_momentum(self, momentum: float) -> "Lars":
        """Sets the momentum, in [0, 1), and returns the optimizer. Default: 0."""
        return self.with_momentum(momentum)

    def with_weight_decay(self, weight_decay: float) -> "Lars":
        """Sets the weight decay, finite and >= 0, and returns the optimizer. Default: 0."""
        return self.with_weight_decay(weight_decay)

    def with_trust_coefficient(self, trust_coefficient: float) -> "Lars":
        """Sets the trust coefficient, finite and > 0, and returns the optimizer. Default: 0.001."""
        return self.with_trust_coefficient(trust_coefficient)

    def with_decayed_norm(self, decayed_norm: bool) -> "Lars":
        """Sets what the trust ratio divides by and returns the optimizer.

        True: ``|g' + weight_decay * w|``, see :class:`fused_lars.LARS`. Default: False.
        """
        return self.with_decayed_norm(decayed_norm)

    def learning_rate(self) -> float:
        """The learning rate of the next step."""
        return self.learning_rate()

    def set_learning_rate(self, lr: float) -> None:
        """Sets the learning rate, finite and >= 0."""
        self.set_learning_rate(lr)

    def step(self, parameter_id: int, weights: Tensor, grad: Tensor) -> None:
        """Updates ``weights`` in place.

        With momentum, a buffer with the shape and dtype of the weights is kept under the id. It starts at
        zero, and starts again at zero when the shape under the id changes. It follows its weights to another
        dtype or device.

        Args:
            parameter_id (int): any integer, the same in every step of these weights.
            weights (Tensor): fp32, fp64, fp16 or bf16, of any shape and strides.
            grad (Tensor): of the shape and device of the weights, and of their dtype or fp32.
        """
        self.step(parameter_id, weights, grad)

    def step_all(self, ids: list[int], weights: list[Tensor], grads: list[Tensor]) -> None:
        """Does what :meth:`step` does for lists of equal length without repetitions.

        Each device gets one fused step.
        """
        self.step_all(ids, weights, grads)

    def step_graph_node(self, graph: list[Tensor], node: int) -> None:
        """Steps the leaf tensor ``graph[node]`` with its own ``.grad``, under the id ``node``.

        A leaf that does not require grad is not changed.
        """
        self.step_graph_node(graph, node)

    def clear_state(self) -> None:
        """Forgets all momentum buffers."""
        self.clear_state()


def _rebuild(state: tuple) -> Any:
    """Makes a Lars from its stored state. Every pickle of a Lars refers to this function by name."""
    lars: Any = torch.ScriptObject.__new__(torch.ScriptObject)
    lars.__setstate__((state, _NAME))
    return lars


def _reduce(script_object: Any) -> Any:
    if not _is_lars(script_object):
        return script_object.__reduce_ex__(2)
    state, _ = script_object.__getstate__()
    return _rebuild, (state,)


# By default pickle makes the object first and sets its state later. A damaged file may leave out the state,
# and a TorchScript object without state crashes the process when it is used.
copyreg.pickle(torch.ScriptObject, _reduce)
torch.serialization.add_safe_globals([_rebuild])
