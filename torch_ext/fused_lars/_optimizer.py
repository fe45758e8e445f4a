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
from ._records import LayerNorms
from ._replaced import SeenParams
from ._state_dict import check_state_dict, implementations, make_portable, restore
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


class LARS(Optimizer):
    r"""Implements layer-wise adaptive rate scaling (LARS) with fused kernels.

    The rule for a parameter ``w`` with gradient ``g`` and momentum buffer ``v`` is as follows. ``|.|`` is the
    L2 norm over the whole parameter (over the global tensor if it is a ``DTensor``)::

        g' = (maximize ? -g : g) / grad_scale
        q  = trust_coefficient * |w| / (|g'| + weight_decay * |w| + eps)
        q  = trust_coefficient * |w| / (|g' + weight_decay * w| + eps)      with decayed_norm
        q  = min(q / lr, 1)                                                 with trust_clip
        u  = q * (g' + weight_decay * w)

        v  = momentum * v + lr * u                                          classic_momentum
        w  = w - (nesterov ? momentum * v + lr * u : v)
        v  = momentum * v + (1 - dampening) * u                             otherwise
        w  = w - lr * (nesterov ? u + momentum * v : v)

    Before ``trust_clip``, ``q`` is 1 if a norm is 0 or NaN, or without ``layer_adaptation``. The rule comes
    from You, Gitman and Ginsburg, `Large Batch Training of Convolutional Networks`_ (2017), equation 6 and
    algorithm 1.

    The two momentum conventions give the same steps while lr is constant. When lr changes, the classic one
    (the paper, Caffe, MLPerf's reference, apex) keeps earlier updates at their own lr, and the other one
    (``torch.optim.SGD``, timm, lightly) scales them with the new lr.

    Parameters are fp32, fp64, fp16 or bf16 tensors of any shape and strides. fp16 and bf16 are computed in
    fp32. A parameter group can override every argument below except ``params``. The arguments after
    ``momentum`` are keyword-only, because other optimizers have them in other orders.

    Args:
        params (iterable): parameters, named parameters, or dicts of parameter groups; see
            :func:`fused_lars.param_groups`.
        lr (float or Tensor): learning rate, finite and >= 0. A Tensor has one element. If it is on the
            parameters' device, the kernels read it there, so a captured CUDA graph follows its changes. If it
            is on the CPU, the host reads it in every step, like a float. Default: 1.0.
        momentum (float): in [0, 1). At 0 no momentum buffer is kept. Default: 0.
        weight_decay (float): finite and >= 0; part of the update and of the trust ratio. Default: 0.
        trust_coefficient (float): finite and > 0. Default: 0.001.
        decayed_norm (bool): divide by the norm of the decayed gradient, as SimCLR, BYOL, Barlow Twins,
            VICReg, DINO, MoCo v3, MAE and optax do. The paper adds both norms instead. The norm is that of
            the computed vector that the update scales. So near ``g' = -weight_decay * w`` it is off by about
            one rounding of ``weight_decay * |w|``. Default: False.
        eps (float): added to the trust ratio's denominator, finite and >= 0. Default: 0.
        dampening (float): in [0, 1]; only with ``classic_momentum=False``. The first update applied to a
            parameter is not damped, as in torch. Default: 0.
        nesterov (bool): Nesterov momentum; needs momentum and no dampening. Default: False.
        maximize (bool): maximize the objective: the gradient is negated first. Default: False.
        trust_clip (bool): use ``min(q / lr, 1)`` for q, as LARC does. Default: False.
        layer_adaptation (bool or "decayed"): False sets q to 1, which is momentum SGD, for bias and
            normalisation parameters. "decayed" means True in a group with weight_decay > 0. In other groups
            it means False and also switches trust_clip off. It is for groups that only set weight_decay.
            Default: True.
        classic_momentum (bool): the momentum convention, see above. Default: True.
        master_weights (bool): keep an fp32 copy ("master_param") and an fp32 momentum buffer for each fp16 or
            bf16 parameter. The update is applied to the copy and then rounded to the parameter. If something
            is written into the parameter between steps (a clamp, loaded weights), the copy takes the elements
            that it no longer rounds to. ``param.data.copy_(...)`` and other writes through ``.data`` are not
            noticed: write under ``torch.no_grad()``. Default: False.
        momentum_dtype (torch.dtype or "int8", optional): the dtype in which momentum is kept: torch.float32,
            torch.bfloat16 or torch.float16 for fp32 parameters; torch.float32 or the parameter's own for fp16
            and bf16 parameters, also with a master; "int8" for all of these: 8-bit codes with an fp32 scale
            for each 128 elements. A buffer that is narrower than its weight is rounded stochastically. fp64
            parameters take torch.float32 alone. None keeps the parameter's dtype, or fp32 with a master.
            Default: None.
        stochastic_rounding (bool): round fp16 and bf16 parameters, and momentum of their dtype, up or down at
            random, so that updates smaller than half a unit in the last place are not lost. For parameters
            without ``master_weights``. Default: False.
        rounding_seed (int): seeds the random bits of stochastic rounding, from 0 to 2**31 - 1. Copies of the
            same parameters in other processes need the same seed. Default: 0.
        foreach (bool, optional): True computes with ordinary torch operators instead of the fused kernels.
        capturable (bool): allow ``step()`` in a CUDA graph capture. Default: False.
        differentiable (bool): let autograd follow ``step()``, with ordinary torch operators. Default: False.
        fused (bool, optional): None uses the fused kernels if the device has them, else ordinary operators.
            False never uses the fused kernels. True makes a parameter without a fused kernel an error. With
            True the kernels also divide by a ``GradScaler``'s scale and skip the step after an overflow:
            nothing waits for the device, gradients stay scaled, and they may be fp16. Otherwise the scaler
            does both before :meth:`step`, as with torch's own optimizers. So clipping works, and so do
            frameworks that ask whether a step was skipped. Default: None.

    Raises:
        ValueError: a value is out of range, options exclude each other, the parameter list is empty, or, in
            :meth:`step`, tensors do not fit together. Nothing has changed then.
        RuntimeError: ``fused=True`` with a parameter that has no fused kernel, or together with ``foreach``
            or ``differentiable``. For a parameter on meta, only :meth:`step` raises it, because the parameter
            usually gets its memory before that.

    State of a parameter: ``momentum_buffer`` (the parameter's shape, of the dtype that ``momentum_dtype``
    says), ``master_param`` (fp32) and, with dampening, ``step`` (the number of updates applied, one fp32
    element). With stochastic rounding also ``rng_state``, an int64 vector: a key made of ``rounding_seed``
    and the parameter's place, the number of updates applied, and the index of the first element (not 0 in a
    shard). With int8 momentum also ``momentum_scale`` (fp32, one for each 128 elements in the order of
    memory). A loaded fp32 buffer of an fp16 or bf16 parameter stays fp32 if ``momentum_dtype`` is None. NaN
    or inf in a gradient reaches the weights, as in ``torch.optim.SGD``. A NaN gives the rest of its layer a
    trust ratio of 1. If a ``GradScaler`` has found the NaN or inf, the step changes nothing.

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
        momentum_dtype: torch.dtype | Literal["int8"] | None = None,
        stochastic_rounding: bool = False,
        rounding_seed: int = 0,
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
            "momentum_dtype": momentum_dtype,
            "stochastic_rounding": stochastic_rounding,
            "rounding_seed": rounding_seed,
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
        # The base class also calls this to load a state. A copy has no attributes yet.
        groups, seen = getattr(self, "param_groups", ()), getattr(self, "_seen_params", SeenParams())
        super().__setstate__(state)
        self._stepper = Stepper()
        # A checkpoint or a pickle of an older version lacks these options.
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
        """Makes a shallow copy. It shares parameters, state, groups and the records of steps."""
        twin = type(self).__new__(type(self))
        twin.__setstate__(self.__getstate__())
        twin._stepper = self._stepper
        return twin

    def _choose_amp_scaling(self) -> None:
        # GradScaler reads this, and so do frameworks that clip gradients. torch's fused optimizers have it
        # too.
        self._step_supports_amp_scaling = all(group["fused"] for group in self.param_groups)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Checks the options of a group and adds it: a dict with ``params`` and overrides of any option.

        Raises:
            ValueError: as the constructor does.
            RuntimeError: as the constructor does.
        """
        # The base class raises the error if this is not a dict, or holds an unordered set.
        if isinstance(param_group, dict) and not isinstance(param_group["params"], set):
            group = {**self.defaults, **param_group}
            check_group(group)
            params = param_group["params"]
            param_group["params"] = params = [params] if isinstance(params, Tensor) else list(params)
            check_params(params, group["fused"], group["momentum_dtype"])
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
        """Looks at the parameters of a group that is new or has had its parameters replaced."""
        self._seen_params.look(self.param_groups[index], index)
        sharding = _sharding_module()
        if sharding and sharding.has_dtensors(self.param_groups[index], index) and self._sharding is None:
            self._sharding = sharding.Sharding()

    def _look_at_replaced_params(self) -> None:
        for index in self._seen_params.replaced(self.param_groups):
            self._look_at_params(index)

    def _is_traceable(self) -> bool:
        if self._sharding is not None or not all(map(uses_ordinary_operators, self.param_groups)):
            return False
        if any(is_dtensor_like(p) for group in self.param_groups for p in group["params"]):
            return False
        # A trace makes these numbers constants. A schedule of one would compile the step again every time.
        # They come last, since comparing a number that has changed is traced too.
        return [_constants(group) for group in self.param_groups] == self._first_constants

    def state_dict(self) -> dict[str, Any]:
        """Returns the state in torch's format, which :meth:`load_state_dict` loads.

        int8 momentum is in it as fp32, without scales. So it fits parameters of any memory format and any
        sharding, and a run that loads it goes on with the same bits. A dtype for ``momentum_dtype`` is in it
        by name ("bfloat16").
        """
        # A hook, so that a user's own hooks see the same as they would without it.
        handle = self.register_state_dict_post_hook(make_portable, prepend=True)
        try:
            return super().state_dict()
        finally:
            handle.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state_dict of LARS, in torch's format.

        Hyperparameters become those of the saved run. ``foreach``, ``capturable``, ``differentiable``,
        ``fused``, ``momentum_dtype`` and ``stochastic_rounding`` stay those of this optimizer. Momentum is
        converted to the dtype that this optimizer keeps; fp32 state of fp16 and bf16 parameters stays fp32,
        bit by bit, if ``momentum_dtype`` is None.

        Raises:
            ValueError: the state comes from another optimizer, or does not fit the parameters. Nothing has
                changed then.
        """
        loaded: dict[str, Any] = {}
        own = implementations(self.param_groups)

        # These are hooks, so that a user's own hooks see the same as they would without them.
        def before(_, state_dict) -> None:
            loaded.update(state_dict)
            sharding = _sharding_module()
            check_sharding = sharding and sharding.check_sharding
            check_state_dict(state_dict, self.defaults, self.param_groups, own, self.state, check_sharding)

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

        All groups go to one op call for each device. Parameters without a gradient are not changed.

        Args:
            closure (callable, optional): reevaluates the model with grad enabled and returns the loss.

        Returns:
            What the closure returned, or None.

        Raises:
            ValueError: a gradient or state tensor does not fit its parameter (shape, dtype, device, sparse
                layout), or an option of a group is no longer allowed; a framework has replaced parameters by
                flat tensors; or the ranks that share ``DTensor`` parameters do not step them alike.
            RuntimeError: ``fused=True`` and a parameter on a device without fused kernels; or another rank
                that shares parameters has an error.
                After an error nothing has changed on any rank that shares the parameters. If they are on an
                accelerator, the step changes nothing, and what other ranks see is raised by their next step.
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
            # A trace keeps nothing between steps, so all values of masters are compared.
            with torch.set_grad_enabled(call.differentiable):
                for param, master in call.masters():
                    take_over(param, master)
            call.run(grad_scale, found_inf, None, None)

    # torch.compile does not trace a method of this name. It runs it as it is.
    def _init_group(self, group, *lists) -> None:
        append_group(group, self.param_groups, self.state, *lists)

    # Not traced, because a single op has nothing to be fused with. A trace would check every parameter in
    # every step, and each new value of an option would compile it again.
    @disable_dynamo
    def _step(self, grad_scale, found_inf) -> None:
        inputs = StepInputs(self.param_groups, self.state, grad_scale, found_inf)
        if not self._stepper.repeat(inputs):
            self._look_at_replaced_params()
            self._stepper.step(inputs, self._sharding)

    @overload
    def trust_ratios(
        self, *, by_name: Literal[False] = False, as_numbers: Literal[False] = False
    ) -> dict[Tensor, Tensor]: ...

    @overload
    def trust_ratios(
        self, *, by_name: Literal[False] = False, as_numbers: Literal[True]
    ) -> dict[Tensor, float]: ...

    @overload
    def trust_ratios(
        self, *, by_name: Literal[True], as_numbers: Literal[False] = False
    ) -> dict[str, Tensor]: ...

    @overload
    def trust_ratios(self, *, by_name: Literal[True], as_numbers: Literal[True]) -> dict[str, float]: ...

    def trust_ratios(self, *, by_name: bool = False, as_numbers: bool = False) -> dict[Any, Any]:
        """Returns the trust ratio q that the last step used for each parameter with a gradient.

        Args:
            by_name (bool): True: the keys are names, as in :func:`fused_lars.param_groups`; the key of a
                parameter without a name is its place in ``param_groups``. False: the keys are parameters.
                Default: False.
            as_numbers (bool): True: the values are floats, and the host waits for the step. Default: False.

        Returns:
            A dict with a 0-dim fp64 tensor for each parameter, on its device (fp32 if the device has no
            fp64). Getting tensors synchronises nothing. Ratios are NaN until a first step was applied. A step
            that a ``GradScaler`` skipped leaves the ratios of the step before. If a norm is 0 or NaN the
            ratio is 1, so look for NaN in :meth:`layer_norms`. Steps of ordinary operators that ran under
            ``torch.compile`` are not recorded.
        """
        return self._stepper.records.trust_ratios(self.param_groups, by_name, as_numbers)

    @overload
    def layer_norms(
        self, *, by_name: Literal[False] = False, as_numbers: Literal[False] = False
    ) -> dict[Tensor, LayerNorms[Tensor]]: ...

    @overload
    def layer_norms(
        self, *, by_name: Literal[False] = False, as_numbers: Literal[True]
    ) -> dict[Tensor, LayerNorms[float]]: ...

    @overload
    def layer_norms(
        self, *, by_name: Literal[True], as_numbers: Literal[False] = False
    ) -> dict[str, LayerNorms[Tensor]]: ...

    @overload
    def layer_norms(
        self, *, by_name: Literal[True], as_numbers: Literal[True]
    ) -> dict[str, LayerNorms[float]]: ...

    def layer_norms(self, *, by_name: bool = False, as_numbers: bool = False) -> dict[Any, Any]:
        """Returns the norms that the last step took before it changed anything.

        Args:
            by_name (bool): as for :meth:`trust_ratios`.
            as_numbers (bool): as for :meth:`trust_ratios`; the result can be written as JSON.

        Returns:
            A dict with a named tuple for each parameter that had a gradient. ``weight`` is the L2 norm of the
            parameter. ``grad`` is the L2 norm of its gradient after division by a ``GradScaler``'s scale. In
            a group with ``decayed_norm``, ``grad`` is the L2 norm of ``g' + weight_decay * w``. For a sharded
            parameter both are norms of the whole. Types and exceptions are those of :meth:`trust_ratios`. A
            NaN or inf in a gradient shows in its norm. If it shows in some layers only, it began in the last
            of them, in the order of the forward pass.
        """
        return self._stepper.records.layer_norms(self.param_groups, by_name, as_numbers)


def _constants(group) -> tuple:
    """The numbers of a group, except the learning rate."""
    return tuple([group[name] for name in NUMBERS if name != "lr"])


def _sharding_module():
    """Returns _sharded/sharding.py if there can be DTensors. Otherwise its import would cost a second."""
    if "torch.distributed.tensor" not in sys.modules:
        return None
    from ._sharded import sharding

    return sharding
