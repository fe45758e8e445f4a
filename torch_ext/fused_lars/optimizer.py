"""LARS as a ``torch.optim.Optimizer``: gathers parameters and state for one op call a device."""

import re
import sys

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, _use_grad_for_differentiable

from .checks import check_group, check_params, check_state
from .op_call import HALF, OpCalls, TrustRatios, Workspaces, parameter_name, way_to_compute

__all__ = ["LARS"]

# How this process computes a step. A checkpoint of another process does not change it.
_IMPLEMENTATION = ("foreach", "capturable", "differentiable", "fused")


class LARS(Optimizer):
    r"""Implements layer-wise adaptive rate scaling (LARS) with fused kernels.

    For a parameter :math:`w`, its gradient and its momentum buffer :math:`v`, with the L2 norm
    :math:`|\cdot|` of the whole parameter (of the global tensor where it is a ``DTensor``):

    .. math::
        g' &= (\text{maximize} ? -g : g) / \text{grad\_scale} \\
        q  &= \text{trust\_coefficient} \cdot |w| / (|g'| + \text{weight\_decay} \cdot |w| + \text{eps})
              \quad (1 \text{ where } |w| \text{ or } |g'| \text{ is 0 or NaN}) \\
        u  &= q \cdot (g' + \text{weight\_decay} \cdot w)

    .. math::
        \text{classic\_momentum:}\quad  v &= \text{momentum} \cdot v + \text{lr} \cdot u, &
             w &= w - (\text{nesterov} ? \text{momentum} \cdot v + \text{lr} \cdot u : v) \\
        \text{otherwise:}\quad  v &= \text{momentum} \cdot v + (1 - \text{dampening}) \cdot u, &
             w &= w - \text{lr} \cdot (\text{nesterov} ? u + \text{momentum} \cdot v : v)

    from You, Gitman and Ginsburg, `Large Batch Training of Convolutional Networks`_ (2017), equation 6 and
    algorithm 1. The two momentum conventions give the same steps while lr is constant. When lr changes, the
    classic one (the paper, Caffe, MLPerf's reference, apex) keeps earlier updates at their own lr, and the
    other one (``torch.optim.SGD``, timm, lightly) scales them with the new lr.

    Parameters are fp32, fp64, fp16 or bf16 tensors of any shape and strides. fp16 and bf16 are computed in
    fp32. Every argument below except ``params`` can be overridden in a parameter group.

    Args:
        params (iterable): parameters, named parameters, or dicts of parameter groups; see
            :func:`fused_lars.param_groups`.
        lr (float or Tensor): learning rate, finite and >= 0. A Tensor has one element. One on the parameters'
            device is read there by the kernels, so that a captured CUDA graph follows its changes; one on the
            CPU is read by the host in every step, as a float is. Default: 1.0.
        momentum (float): in [0, 1). At 0 no momentum buffer is kept. Default: 0.
        weight_decay (float): finite and >= 0; part of the update and of the trust ratio. Default: 0.
        trust_coefficient (float): finite and > 0. Default: 0.001.
        eps (float): added to the trust ratio's denominator, finite and >= 0. Default: 0.
        dampening (float): in [0, 1]; with ``classic_momentum=False`` only. The first update applied to a
            parameter is not damped, as in torch. Default: 0.
        nesterov (bool): Nesterov momentum; needs a momentum and no dampening. Default: False.
        maximize (bool): maximize the objective: the gradient is negated first. Default: False.
        trust_clip (bool): use ``min(q / lr, 1)`` for q, as LARC does. Default: False.
        layer_adaptation (bool): False sets q to 1: momentum SGD, meant for bias and normalisation parameters.
            Default: True.
        classic_momentum (bool): the momentum convention, see above. Default: True.
        master_weights (bool): keep an fp32 copy ("master_param") and an fp32 momentum buffer for each fp16 or
            bf16 parameter; the update is applied to the copy and rounded to the parameter. Values that are
            written into the parameter later do not reach the copy: load weights before the first step, or
            together with the optimizer's state. Default: False.
        foreach (bool, optional): True computes with ordinary torch operators instead of the fused kernels.
        capturable (bool): allow ``step()`` in a CUDA graph capture. Default: False.
        differentiable (bool): let autograd follow ``step()``, with ordinary torch operators. Default: False.
        fused (bool, optional): None takes the fused kernels where the device has them and ordinary operators
            elsewhere; True makes a parameter without a fused kernel an error; False never takes them.

    Raises:
        ValueError: a value out of range, options that exclude each other, an empty parameter list, or, in
            :meth:`step`, tensors that do not fit together. Nothing has changed then.
        RuntimeError: ``fused=True`` for a parameter that has no fused kernel, or together with ``foreach`` or
            ``differentiable``.

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

    # GradScaler leaves the unscaling and the skipping to step(): the kernels do both.
    _step_supports_amp_scaling = True

    # Its name in older versions of torch.
    if not hasattr(Optimizer, "_accelerator_graph_capture_health_check"):
        _accelerator_graph_capture_health_check = Optimizer._cuda_graph_capture_health_check

    def __init__(
        self,
        params,
        lr: float | Tensor = 1.0,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
        *,
        eps: float = 0.0,
        dampening: float = 0.0,
        nesterov: bool = False,
        maximize: bool = False,
        trust_clip: bool = False,
        layer_adaptation: bool = True,
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
        self._make_scratch()
        self._sharding = None
        super().__init__(params, defaults)

    def __setstate__(self, state) -> None:
        super().__setstate__(state)
        self._make_scratch()
        # Groups of a checkpoint that an older version wrote.
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
        self._sharding = None
        for index in range(len(self.param_groups)):
            self._prepare_sharding(index)

    def _make_scratch(self) -> None:
        """What calls write and no state_dict holds, by the keys of OpCalls."""
        self._trust_ratios: dict[tuple, TrustRatios] = {}  # of the last step
        self._captured_trust_ratios: list[TrustRatios] = []  # that graphs go on to write
        self._workspaces = Workspaces()

    def add_param_group(self, param_group) -> None:
        """Adds a group, a dict with ``params`` and overrides of any option, after checking its options.

        Raises:
            ValueError, RuntimeError: as the constructor does.
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
            self._prepare_sharding(len(self.param_groups) - 1)
        except ValueError:
            del self.param_groups[-1]
            raise

    def _prepare_sharding(self, index) -> None:
        sharding = _sharding_module()
        if sharding and sharding.has_dtensors(self.param_groups[index], index) and self._sharding is None:
            self._sharding = sharding.Sharding()

    def load_state_dict(self, state_dict) -> None:
        """Loads a state of LARS, in torch's format.

        Hyperparameters are those of the saved run; ``foreach``, ``capturable``, ``differentiable`` and
        ``fused`` stay those of this optimizer. fp32 state of fp16 and bf16 parameters stays fp32, bit by bit.

        Raises:
            ValueError: the state is of another optimizer, or does not fit the parameters. Nothing has changed
                then.
        """
        implementations = [{name: group[name] for name in _IMPLEMENTATION} for group in self.param_groups]
        loaded = {}

        # Hooks, so that hooks of users before and after see what they would see without ours.
        def check(_, state_dict) -> None:
            loaded.update(state_dict)
            self._check_state_dict(state_dict)

        def restore(_) -> None:
            for group, implementation in zip(self.param_groups, implementations):
                group.update(implementation)
            # The base class has cast floating-point state to the parameter's dtype.
            for saved_id, param in self._saved_ids(loaded):
                for key, value in loaded["state"].get(saved_id, {}).items():
                    if isinstance(value, Tensor):
                        exact = key == "step" or (value.dtype == torch.float32 and param.dtype in HALF)
                        self.state[param][key] = value.to(param.device, value.dtype if exact else param.dtype)

        handles = (
            self.register_load_state_dict_pre_hook(check),
            self.register_load_state_dict_post_hook(restore, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def _saved_ids(self, state_dict):
        """Pairs of a parameter's id in a state_dict and the parameter."""
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        return zip(saved, (p for group in self.param_groups for p in group["params"]))

    def _check_state_dict(self, state_dict) -> None:
        missing = {"state", "param_groups"} - set(state_dict)
        if missing:
            raise ValueError(
                f"this is not a state_dict: it has no {sorted(missing)}, only {sorted(state_dict)}"
            )
        for index, group in enumerate(state_dict["param_groups"]):
            if "trust_coefficient" not in group:
                raise ValueError(
                    f"this is not a state_dict of LARS: param_groups[{index}] has no 'trust_coefficient', "
                    f"only {sorted(k for k in group if k != 'params')}"
                )
            check_group({**self.defaults, **group, **dict.fromkeys(_IMPLEMENTATION)})
        saved, own = (
            [len(group["params"]) for group in groups]
            for groups in (state_dict["param_groups"], self.param_groups)
        )
        if saved != own:
            return  # the base class has the error
        sharding = _sharding_module()
        for saved_id, param in self._saved_ids(state_dict):
            for key, value in state_dict["state"].get(saved_id, {}).items():
                if key in ("momentum_buffer", "master_param", "step"):
                    check_state(saved_id, key, value, param)
                    if sharding and key != "step":
                        sharding.check_state(saved_id, key, value, param)

    def _init_group(self, group, params, grads, momentum_buffers, master_params, steps) -> None:
        """Appends a group's parameters that have a gradient, and their state, made where it is missing."""
        has_momentum = group["momentum"] != 0
        has_step = has_momentum and group["dampening"] != 0
        master_weights = group["master_weights"]
        for p in group["params"]:
            grad = p.grad
            if grad is None:
                continue
            params.append(p)
            grads.append(grad)
            if not has_momentum and not master_weights:
                continue
            state = self.state[p]
            has_master = master_weights and p.dtype in HALF
            if has_master:
                if "master_param" not in state:
                    state["master_param"] = p.detach().to(torch.float32)
                master_params.append(state["master_param"])
            if not has_momentum:
                continue
            had_buffer = "momentum_buffer" in state
            if not had_buffer:
                # Zeros, so that a first step that AMP skips leaves a valid buffer.
                dtype = torch.float32 if has_master else p.dtype
                state["momentum_buffer"] = torch.zeros_like(
                    p, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False
                )
            elif has_master and state["momentum_buffer"].dtype in HALF:
                state["momentum_buffer"] = state["momentum_buffer"].to(torch.float32)
            momentum_buffers.append(state["momentum_buffer"])
            if has_step:
                if "step" not in state:
                    # A buffer that was there before dampening was has seen its first update.
                    state["step"] = torch.full((), float(had_buffer), dtype=torch.float32, device=p.device)
                steps.append(state["step"])

    @_use_grad_for_differentiable
    def step(self, closure=None):
        """Performs one step, in place.

        All groups go to one op call for each device. Parameters without a gradient are left alone.

        Args:
            closure (callable, optional): reevaluates the model with grad enabled and returns the loss.

        Returns:
            What the closure returned, or None.

        Raises:
            ValueError: a gradient or state tensor does not fit its parameter (shape, dtype, device, sparse
                layout). Nothing has changed then.
        """
        self._accelerator_graph_capture_health_check()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        grad_scale = getattr(self, "grad_scale", None)
        found_inf = getattr(self, "found_inf", None)
        calls = self._calls() if self._sharding is None else self._sharding.calls(self, found_inf)
        calls = {key: call for key, call in calls.items() if call.params}
        if torch.compiler.is_compiling():
            # Scratch is no part of a traced program: there the op makes its own.
            for call in calls.values():
                call.run(grad_scale, found_inf, None, None)
            return loss
        self._trust_ratios = {key: self._trust_ratios_of(key, call.params) for key, call in calls.items()}
        # A step of several calls is checked as a whole before the first of them writes.
        for check_only in (True, False) if len(calls) > 1 else (False,):
            for key, call in calls.items():
                workspace = self._workspaces[call.device]
                try:
                    call.run(
                        grad_scale, found_inf, self._trust_ratios[key].tensor, workspace.tensor, check_only
                    )
                except ValueError as error:
                    whose = self._whose(call, str(error))
                    raise ValueError(call.in_words_of_param_groups(str(error)) + whose) from None
                workspace.after_use()
        if self._sharding is not None:
            self._sharding.bump_versions()
        return loss

    def _calls(self) -> OpCalls:
        calls = OpCalls()
        for index, group in enumerate(self.param_groups):
            way, params = way_to_compute(group), group["params"]
            if len(params) == 1 or len({p.device for p in params}) == 1:
                call = calls[(params[0].device, *way)]
                self._init_group(group, *call.lists)
                call.end_group(group, index)
                continue
            lists = ([], [], [], [], [])
            self._init_group(group, *lists)
            for device in dict.fromkeys(p.device for p in lists[0]):
                call = calls[(device, *way)]
                call.add_lists([[t for t in tensors if t.device == device] for tensors in lists])
                call.end_group(group, index)
        return calls

    def _whose(self, call, message) -> str:
        """Names the parameter that an op's message is about; the op knows its place in a list of the call."""
        found = re.match(r"(\w+)\[(\d+)\]", message)
        if not found or not isinstance(getattr(call, found[1], None), list):
            return ""
        tensor = getattr(call, found[1])[int(found[2])]
        for group_index, group in enumerate(self.param_groups):
            for index, p in enumerate(group["params"]):
                if any(tensor is t for t in (p, p.grad, *self.state.get(p, {}).values())):
                    return f" ({parameter_name(group, group_index, index)})"
        return ""

    def _trust_ratios_of(self, key, params) -> TrustRatios:
        device, ids = key[0], [*map(id, params)]
        ratios = self._trust_ratios.get(key)
        if ratios is None or ratios.param_ids != ids:
            ratios = TrustRatios(device, params, ids)
        if device.type == "cuda" and not ratios.is_captured and torch.cuda.is_current_stream_capturing():
            ratios.is_captured = True
            self._captured_trust_ratios.append(ratios)
        return ratios

    def trust_ratios(self) -> dict[Tensor, Tensor]:
        """The trust ratio q that the last step used, of every parameter that had a gradient.

        Returns:
            A dict from parameter to a 0-dim fp64 tensor on the parameter's device (fp32 where the device has
            no fp64). Nothing is synchronised. NaN until a first step was applied; a step that a
            ``GradScaler`` skipped leaves the ratios of the step before. Where a norm is 0 or NaN the ratio is
            1: look for NaN in gradients, not here. Steps that ran under ``torch.compile`` are not recorded.
        """
        result: dict[Tensor, Tensor] = {}
        for ratios in self._trust_ratios.values():
            # A copy, since the next step overwrites the tensor.
            result.update(zip(ratios.params, ratios.tensor.clone().unbind()))
        return result


def _sharding_module():
    """sharding.py where there can be DTensors; elsewhere it would make torch import for a second."""
    if "torch.distributed.tensor" not in sys.modules:
        return None
    from . import sharding

    return sharding
