"""LARS as a ``torch.optim.Optimizer``: gathers parameters and state for one op call a device."""

import sys
from collections.abc import Callable
from typing import Any, Literal, TypeVar, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from ._checks import ADDED_OPTIONS, NUMBERS, check_group, check_params
from ._gather import append_group, gather_calls
from ._masters import take_over
from ._op_call import uses_ordinary_operators
from ._records import ReadsRecords, Records
from ._replaced import SeenParams
from ._state_dict import check_state_dict, implementations, restore
from ._step_inputs import StepInputs
from ._stepper import Stepper
from ._torch_internals import (
    check_graph_capture,
    disable_dynamo,
    is_dtensor_like,
    use_grad_for_differentiable,
)

__all__ = ["LARS"]

Loss = TypeVar("Loss")


class LARS(ReadsRecords, Optimizer):
    r"""Implements layer-wise adaptive rate scaling (LARS) with fused kernels.

    For a parameter ``w``, its gradient ``g`` and its momentum buffer ``v``, with the L2 norm ``|.|`` of the
    whole parameter (of the global tensor where it is a ``DTensor``)::

        g' = (maximize ? -g : g) / grad_scale
        q  = trust_coefficient * |w| / (|g'| + weight_decay * |w| + eps)
        q  = trust_coefficient * |w| / (|g' + weight_decay * w| + eps)      with decayed_norm
        q  = min(q / lr, 1)                                                 with trust_clip
        u  = q * (g' + weight_decay * w)

        v  = momentum * v + lr * u                                          classic_momentum
        w  = w - (nesterov ? momentum * v + lr * u : v)
        v  = momentum * v + (1 - dampening) * u                             otherwise
        w  = w - lr * (nesterov ? u + momentum * v : v)

    Before ``trust_clip``, ``q`` is 1 where a norm is 0 or NaN, and without ``layer_adaptation``. The rule is
    that of You, Gitman and Ginsburg, `Large Batch Training of Convolutional Networks`_ (2017), equation 6 and
    algorithm 1.

    The two momentum conventions give the same steps while lr is constant. When lr changes, the classic one
    (the paper, Caffe, MLPerf's reference, apex) keeps earlier updates at their own lr, and the other one
    (``torch.optim.SGD``, timm, lightly) scales them with the new lr.

    Parameters are fp32, fp64, fp16 or bf16 tensors of any shape and strides. fp16 and bf16 are computed in
    fp32. Every argument below except ``params`` can be overridden in a parameter group. Those after
    ``momentum`` are keywords, since other optimizers have them in other orders.

    Args:
        params (iterable): parameters, named parameters, or dicts of parameter groups; see
            :func:`fused_lars.param_groups`.
        lr (float or Tensor): learning rate, finite and >= 0. A Tensor has one element. One on the parameters'
            device is read there by the kernels, so that a captured CUDA graph follows its changes; one on the
            CPU is read by the host in every step, as a float is. Default: 1.0.
        momentum (float): in [0, 1). At 0 no momentum buffer is kept. Default: 0.
        weight_decay (float): finite and >= 0; part of the update and of the trust ratio. Default: 0.
        trust_coefficient (float): finite and > 0. Default: 0.001.
        decayed_norm (bool): divide by the norm of the decayed gradient, as SimCLR, BYOL, Barlow Twins,
            VICReg, DINO, MoCo v3, MAE and optax do. The paper adds both norms. It is the norm of the vector
            that the update scales, as computed: near ``g' = -weight_decay * w`` it is off by about one
            rounding of ``weight_decay * |w|``. Default: False.
        eps (float): added to the trust ratio's denominator, finite and >= 0. Default: 0.
        dampening (float): in [0, 1]; with ``classic_momentum=False`` only. The first update applied to a
            parameter is not damped, as in torch. Default: 0.
        nesterov (bool): Nesterov momentum; needs a momentum and no dampening. Default: False.
        maximize (bool): maximize the objective: the gradient is negated first. Default: False.
        trust_clip (bool): use ``min(q / lr, 1)`` for q, as LARC does. Default: False.
        layer_adaptation (bool or "decayed"): False sets q to 1: momentum SGD, meant for bias and
            normalisation parameters. "decayed" is True where weight_decay > 0; elsewhere it is False and
            switches trust_clip off too, for groups that know only weight_decay. Default: True.
        classic_momentum (bool): the momentum convention, see above. Default: True.
        master_weights (bool): keep an fp32 copy ("master_param") and an fp32 momentum buffer for each fp16 or
            bf16 parameter; the update is applied to the copy and rounded to the parameter. What is written
            into the parameter between steps (a clamp, loaded weights) replaces the copy's elements that no
            longer round to it. ``param.data.copy_(...)`` and other writes through ``.data`` are not noticed:
            write under ``torch.no_grad()``. Default: False.
        foreach (bool, optional): True computes with ordinary torch operators instead of the fused kernels.
        capturable (bool): allow ``step()`` in a CUDA graph capture. Default: False.
        differentiable (bool): let autograd follow ``step()``, with ordinary torch operators. Default: False.
        fused (bool, optional): None takes the fused kernels where the device has them and ordinary operators
            elsewhere; True makes a parameter without a fused kernel an error; False never takes them. True
            also leaves it to the kernels to divide by a ``GradScaler``'s scale and to skip after an overflow:
            nothing waits for the device, gradients stay scaled, and they may be fp16. Otherwise
            the scaler does both before :meth:`step`, as with torch's own optimizers, so that clipping and
            frameworks that ask whether a step was skipped work. Default: None.

    Raises:
        ValueError: a value out of range, options that exclude each other, an empty parameter list, or, in
            :meth:`step`, tensors that do not fit together. Nothing has changed then.
        RuntimeError: ``fused=True`` for a parameter that has no fused kernel (on meta: in :meth:`step`, since
            it is made real before), or together with ``foreach`` or ``differentiable``.

    State of a parameter: ``momentum_buffer`` (the parameter's shape and dtype, or fp32 with a master),
    ``master_param`` (fp32) and, with dampening, ``step`` (the updates applied, one fp32 element). A loaded
    fp32 buffer of an fp16 or bf16 parameter stays fp32. A gradient that holds NaN or inf reaches the weights
    as in ``torch.optim.SGD``, and a NaN leaves the rest of its layer with a trust ratio of 1, unless a
    ``GradScaler`` found it: then the step changes nothing.

    Example:
        >>> groups = fused_lars.param_groups(model, weight_decay=1e-4)
        >>> optimizer = fused_lars.LARS(groups, lr=10.0, momentum=0.9)
        >>> model(inputs).sum().backward()
        >>> optimizer.step()

    .. _Large Batch Training of Convolutional Networks: https://arxiv.org/abs/1708.03888
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        momentum: float = 0.0,
        *,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
        decayed_norm: bool = False,
        eps: float = 0.0,
        dampening: float = 0.0,
        nesterov: bool = False,
        maximize: bool = False,
        trust_clip: bool = False,
        layer_adaptation: bool | Literal["decayed"] = True,
        classic_momentum: bool = True,
        master_weights: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "decayed_norm": decayed_norm,
            "eps": eps,
            "dampening": dampening,
            "nesterov": nesterov,
            "maximize": maximize,
            "trust_clip": trust_clip,
            "layer_adaptation": layer_adaptation,
            "classic_momentum": classic_momentum,
            "master_weights": master_weights,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
        }
        check_group(defaults)
        self._stepper = Stepper()
        self._sharding = None
        self._seen_params = SeenParams()
        super().__init__(params, defaults)
        self._choose_amp_scaling()

    def __setstate__(self, state: dict[str, Any]) -> None:
        # The base class loads a state by this too, and a copy has nothing yet.
        groups, seen = getattr(self, "param_groups", ()), getattr(self, "_seen_params", SeenParams())
        super().__setstate__(state)
        self._stepper = Stepper()
        # Groups of a checkpoint or a pickle that an older version wrote.
        for name, value in ADDED_OPTIONS.items():
            self.defaults.setdefault(name, value)
            for group in self.param_groups:
                group.setdefault(name, value)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
        self._first_constants = [*map(_constants, self.param_groups)]
        if "_step_supports_amp_scaling" not in self.__dict__:
            self._choose_amp_scaling()
        self._sharding = getattr(self, "_sharding", None)
        self._seen_params = seen.of_same_groups(groups, self.param_groups)

    def __copy__(self) -> "LARS":
        """A shallow copy: it shares parameters, state and groups, and what steps record."""
        twin = type(self).__new__(type(self))
        twin.__setstate__(self.__getstate__())
        twin._stepper = self._stepper
        return twin

    @property
    def _records(self) -> Records:
        return self._stepper.records

    def _choose_amp_scaling(self) -> None:
        # Read by GradScaler, and by frameworks that clip gradients, as it is of torch's fused optimizers.
        self._step_supports_amp_scaling = all(group["fused"] for group in self.param_groups)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, a dict with ``params`` and overrides of any option, after checking its options.

        Raises:
            ValueError: as the constructor does.
            RuntimeError: as the constructor does.
        """
        # What is no dict, or holds an unordered set, is the base class's error.
        if isinstance(param_group, dict) and not isinstance(param_group["params"], set):
            group = {**self.defaults, **param_group}
            check_group(group)
            params = param_group["params"]
            param_group["params"] = params = [params] if isinstance(params, Tensor) else list(params)
            check_params(params, fused=group["fused"])
        super().add_param_group(param_group)
        try:
            self._look_at_params(len(self.param_groups) - 1)
        except ValueError:
            del self.param_groups[-1]
            raise
        if not self.param_groups[-1]["fused"]:
            self._step_supports_amp_scaling = False
        self._first_constants = [*map(_constants, self.param_groups)]

    def _look_at_params(self, index) -> None:
        """Looks at a group's parameters, which are new or others than before."""
        self._seen_params.look(self.param_groups[index], index)
        sharding = _sharding_module()
        if sharding and sharding.has_dtensors(self.param_groups[index], index) and self._sharding is None:
            self._sharding = sharding.Sharding()

    def _look_at_replaced_params(self) -> None:
        for index in self._seen_params.replaced(self.param_groups):
            self._look_at_params(index)

    def _is_traceable(self) -> bool:
        # A trace takes these for constants, and a schedule of one would be compiled anew in every step.
        if [_constants(group) for group in self.param_groups] != self._first_constants:
            return False
        if self._sharding is not None or not all(map(uses_ordinary_operators, self.param_groups)):
            return False
        return not any(is_dtensor_like(p) for group in self.param_groups for p in group["params"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state of LARS, in torch's format.

        Hyperparameters are those of the saved run; ``foreach``, ``capturable``, ``differentiable`` and
        ``fused`` stay those of this optimizer. fp32 state of fp16 and bf16 parameters stays fp32, bit by bit.

        Raises:
            ValueError: the state is of another optimizer, or does not fit the parameters. Nothing has changed
                then.
        """
        loaded, own = {}, implementations(self.param_groups)

        # Hooks, so that hooks of users before and after see what they would see without ours.
        def before(_, state_dict) -> None:
            loaded.update(state_dict)
            sharding = _sharding_module()
            check_sharding = sharding and sharding.check_sharding
            check_state_dict(state_dict, self.defaults, self.param_groups, self.state, check_sharding)

        def after(_) -> None:
            restore(loaded, own, self.param_groups, self.state)

        handles = (
            self.register_load_state_dict_pre_hook(before),
            self.register_load_state_dict_post_hook(after, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], Loss]) -> Loss: ...

    @use_grad_for_differentiable
    def step(self, closure: Callable[[], Loss] | None = None) -> Loss | None:
        """Performs one step, in place.

        All groups go to one op call for each device. Parameters without a gradient are left alone.

        Args:
            closure (callable, optional): reevaluates the model with grad enabled and returns the loss.

        Returns:
            What the closure returned, or None.

        Raises:
            ValueError: a gradient or state tensor does not fit its parameter (shape, dtype, device, sparse
                layout), or an option of a group is no longer allowed; a framework has put flat tensors in the
                place of parameters; or the ranks that share ``DTensor`` parameters do not step them alike.
            RuntimeError: ``fused=True`` and a parameter on a device without fused kernels; or another rank
                that shares parameters has an error.
                Nothing has changed then, on all ranks that share parameters. Where these are on an
                accelerator, the step changes nothing and it is the next one that raises what other ranks see.
        """
        check_graph_capture(self)
        loss: Loss | None = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        arguments = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if torch.compiler.is_compiling() and self._is_traceable():
            self._traced_step(*arguments)
        else:
            self._step(*arguments)
        return loss

    def _traced_step(self, grad_scale, found_inf) -> None:
        """A step of ordinary operators, which torch.compile fuses."""
        for call in gather_calls(self.param_groups, self._init_group).values():
            if not call.params:
                continue
            # A trace keeps nothing from one step to the next: all values of masters are compared.
            with torch.set_grad_enabled(call.differentiable):
                for param, master in call.masters():
                    take_over(param, master)
            call.run(grad_scale, found_inf, None, None)

    # torch.compile runs a method of this name as it is, instead of tracing it.
    def _init_group(self, group, params, grads, momentum_buffers, master_params, steps) -> None:
        append_group(group, self.state, params, grads, momentum_buffers, master_params, steps)

    # One op has nothing to be fused with. A trace of it would check every parameter in every step, and would
    # be made anew for every value of an option.
    @disable_dynamo
    def _step(self, grad_scale, found_inf) -> None:
        inputs = StepInputs(self.param_groups, self.state, grad_scale, found_inf)
        if not self._stepper.repeat(inputs):
            self._look_at_replaced_params()
            self._stepper.step(inputs, self._sharding)


def _constants(group) -> tuple:
    """The numbers of a group but for the learning rate."""
    return tuple([group[name] for name in NUMBERS if name != "lr"])


def _sharding_module():
    """_sharding.py where there can be DTensors; elsewhere it would make torch import for a second."""
    if "torch.distributed.tensor" not in sys.modules:
        return None
    from ._sharded import sharding

    return sharding
