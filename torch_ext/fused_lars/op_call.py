"""The calls of the op that a step makes: their lists, and the scratch that outlives them."""

from functools import partial
from operator import itemgetter

import torch
from torch import Tensor

from . import _library  # noqa: F401  registers torch.ops.fused_lars

# Hyperparameters of a group, by the names that the op has for them.
HYPERPARAMETERS = (
    "lr", "momentum", "weight_decay", "trust_coefficient", "eps", "dampening",
    "nesterov", "maximize", "trust_clip", "layer_adaptation", "classic_momentum", "master_weights",
)  # fmt: skip
_get_hyperparameters = itemgetter(*HYPERPARAMETERS)

# The op's kernel for meta tensors checks its arguments and does nothing else.
_META = torch._C.DispatchKeySet(torch._C.DispatchKey.Meta)


class OpCall:
    """The lists of one op call: all parameters on one device, group after group."""

    def __init__(self, device: torch.device, reference: bool) -> None:
        self.device = device
        self.reference = reference  # with ordinary operators instead of the fused kernels
        self.lists: tuple[list[Tensor], ...] = ([], [], [], [], [])
        self.params, self.grads, self.momentum_buffers, self.master_params, self.steps = self.lists
        self.group_ends: list[int] = []
        self.hyperparameters: list[tuple] = []
        # For DTensors, see sharding.py: the lists as local tensors, the norms of whole tensors, and what the
        # ranks found together.
        self.local: tuple[list[Tensor], ...] | None = None
        self.squared_norms: Tensor | None = None
        self.found_inf: Tensor | None = None

    def add_lists(self, lists, local=None) -> None:
        for tensors, more in zip(self.lists, lists):
            tensors += more
        if local is not None:
            self.local = self.local or ([], [], [], [], [])
            for tensors, more in zip(self.local, local):
                tensors += more

    def end_group(self, group) -> None:
        """What was added since the group before is this one's."""
        self.group_ends.append(len(self.params))
        self.hyperparameters.append(_get_hyperparameters(group))

    def run(self, grad_scale, found_inf, scratch, check_only=False) -> None:
        device = self.device
        values = dict(zip(HYPERPARAMETERS, map(list, zip(*self.hyperparameters))))
        overload = "default"
        if any(isinstance(lr, Tensor) for lr in values["lr"]):
            overload = "tensor_lr"
            values["lr"] = [_lr_tensor(lr, device) for lr in values["lr"]]
        if check_only:
            op = partial(getattr(torch.ops.fused_lars.step_, overload).redispatch, _META)
        else:
            ops = torch.ops.fused_lars
            op = getattr(ops.reference_step_ if self.reference else ops.step_, overload)
        if self.found_inf is not None:
            found_inf = self.found_inf
        op(
            *(self.local or self.lists),
            [end - begin for begin, end in zip([0, *self.group_ends], self.group_ends)],
            **values,
            squared_norms=self.squared_norms,
            grad_scale=on_device(grad_scale, device),
            found_inf=on_device(found_inf, device),
            trust_ratios=None if scratch is None else scratch.trust_ratios,
            workspace=None if scratch is None else scratch.workspace,
        )


class OpCalls(dict[tuple[torch.device, bool], OpCall]):
    """The calls of a step, by device and implementation; one that is missing is made."""

    def __missing__(self, key) -> OpCall:
        call = self[key] = OpCall(*key)
        return call


class Scratch:
    """Tensors that an op call writes and that no state_dict holds; kept, so that a step allocates nothing."""

    def __init__(self, device: torch.device, params: list[Tensor], param_ids: list[int], before) -> None:
        self.params = list(params)
        self.param_ids = param_ids
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.trust_ratios = torch.full((len(params),), torch.nan, dtype=dtype, device=device)
        # Resized by the op to what it needs, so that it serves any set of parameters.
        self.workspace = before.workspace if before else torch.zeros(0, dtype=torch.int32, device=device)


def uses_reference(group) -> bool:
    return bool(group["foreach"] or group["differentiable"] or group["fused"] is False)


def parameter_name(group, group_index: int, index: int) -> str:
    """A parameter's name in an error."""
    name = f" {group['param_names'][index]!r}," if "param_names" in group else ""
    return f"parameter{name} param_groups[{group_index}]['params'][{index}]"


def on_device(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    """A scalar where a step reads it; the copy does not block, unless it is the host that will read."""
    return None if tensor is None else tensor.to(device, non_blocking=device.type != "cpu")


def _lr_tensor(lr: float | Tensor, device: torch.device) -> Tensor:
    """An lr as the op's tensor_lr overload takes it: on the CPU or on the parameters' device."""
    if not isinstance(lr, Tensor):
        return torch.tensor(lr, dtype=torch.float64)
    return lr if lr.device.type == "cpu" else on_device(lr, device)
