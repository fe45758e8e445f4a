"""``fused_lars.Lars``: LARS with its state kept under parameter ids, in eager code and in TorchScript."""

import copyreg

import torch

from . import _library  # noqa: F401  registers torch.classes.fused_lars

__all__ = ["Lars"]

_NAME = "__torch__.torch.classes.fused_lars.Lars"


class _ScriptClass(type):
    # Objects of a TorchScript class are torch.ScriptObject, and the class itself is no type.
    def __call__(cls, base_lr: float) -> "Lars":
        return torch.classes.fused_lars.Lars(base_lr)

    def __instancecheck__(cls, instance) -> bool:
        return isinstance(instance, torch.ScriptObject) and instance._type().qualified_name() == _NAME


class Lars(metaclass=_ScriptClass):
    r"""LARS whose state is kept under parameter ids that the caller chooses.

    For programs without a ``torch.optim.Optimizer``: TorchScript, and whatever keeps its own list of
    parameters. The rule is that of :class:`fused_lars.LARS` with ``classic_momentum=True`` (You, Gitman and
    Ginsburg 2017, algorithm 1); the fused kernels compute it.

    ``Lars(base_lr)`` makes an object of the TorchScript class ``torch.classes.fused_lars.Lars``; code that
    ``torch.jit.script`` compiles uses that name, for the constructor and in annotations. The C++ class is
    ``fused_lars::Lars``.

    Args:
        base_lr (float): learning rate, finite and >= 0.

    Methods:
        with_momentum(momentum), with_weight_decay(weight_decay), with_trust_coefficient(trust_coefficient):
            set what they name and return the optimizer. Defaults are 0, 0 and 0.001; allowed are [0, 1),
            finite and >= 0, finite and > 0.
        with_decayed_norm(decayed_norm): True divides by ``|g' + weight_decay * w|``, see
            :class:`fused_lars.LARS`. Returns the optimizer. Default: False.
        learning_rate() -> float
        set_learning_rate(lr)
        step(parameter_id, weights, grad): updates ``weights`` (fp32, fp64, fp16 or bf16, any shape and
            strides) in place. ``grad`` has its shape and device, and its dtype or fp32. With momentum, a
            buffer of the shape and dtype of the weights is kept under the id; it starts at zero, and again
            when the shape under the id changes. It follows its weights to another dtype or device.
        step_all(ids, weights, grads): the same for lists of equal length without repetitions, as one fused
            step for each device.
        step_graph_node(graph, node): steps the leaf tensor ``graph[node]`` with its own ``.grad``, under the
            id ``node``. A leaf that does not require grad is left alone.
        clear_state(): forgets all momentum buffers.

    Copies and storage: ``copy.deepcopy`` and ``pickle`` copy the settings and the buffers, and a scripted
    module that holds the object saves them with itself. ``copy.copy`` gives a second name of the same
    optimizer. ``fused_lars`` must be imported before ``torch.jit.load`` and ``torch.load``, which then needs
    no ``weights_only=False``.

    Raises:
        ValueError: a value out of range, tensors that do not fit together, repeated ids, a node outside of
            the graph or one that requires grad and has none. Nothing has changed then. In scripted code the
            TorchScript interpreter replaces it by a RuntimeError with the same text, as it does with every
            operator's error.

    Example:
        >>> optimizer = fused_lars.Lars(0.1).with_momentum(0.9).with_weight_decay(5e-4)
        >>> optimizer.step(0, weight, weight_grad)
        >>> optimizer.step_all([0, 1], [weight, bias], [weight_grad, bias_grad])
    """


def _rebuild(state: tuple) -> "Lars":
    """A Lars from its stored state; the name is in every pickle."""
    lars = torch.ScriptObject.__new__(torch.ScriptObject)
    lars.__setstate__((state, _NAME))
    return lars


def _reduce(script_object: torch.ScriptObject) -> tuple:
    if not isinstance(script_object, Lars):
        return script_object.__reduce_ex__(2)
    state, _ = script_object.__getstate__()
    return _rebuild, (state,)


# By itself pickle makes the object first and sets its state later. A damaged file may leave out the second,
# and an object of TorchScript without a state crashes the process when it is used.
copyreg.pickle(torch.ScriptObject, _reduce)
torch.serialization.add_safe_globals([_rebuild])
