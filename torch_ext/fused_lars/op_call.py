"""The calls of the op that a step makes: their lists, and what outlives a step."""

import re
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

# Parameters of these dtypes may have fp32 state.
HALF = (torch.float16, torch.bfloat16)

# The op's kernel for meta tensors checks its arguments and does nothing else.
_META = torch._C.DispatchKeySet(torch._C.DispatchKey.Meta)


class OpCall:
    """The lists of one op call: all parameters on one device, group after group."""

    def __init__(self, device: torch.device, reference: bool, differentiable: bool) -> None:
        self.device = device
        self.reference = reference  # with ordinary operators instead of the fused kernels
        self.differentiable = differentiable
        self.lists: tuple[list[Tensor], ...] = ([], [], [], [], [])
        self.params, self.grads, self.momentum_buffers, self.master_params, self.steps = self.lists
        self.group_ends: list[int] = []
        self.group_indices: list[int] = []  # in param_groups
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

    def end_group(self, group, index: int) -> None:
        """What was added since the group before is this one's, which is param_groups[index]."""
        self.group_ends.append(len(self.params))
        self.group_indices.append(index)
        self.hyperparameters.append(_get_hyperparameters(group))

    def run(self, grad_scale, found_inf, trust_ratios, workspace, check_only=False) -> None:
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
        with torch.set_grad_enabled(self.differentiable):
            op(
                *(self.local or self.lists),
                [end - begin for begin, end in zip([0, *self.group_ends], self.group_ends)],
                **values,
                squared_norms=self.squared_norms,
                grad_scale=on_device(grad_scale, device),
                found_inf=on_device(found_inf, device),
                trust_ratios=trust_ratios,
                workspace=workspace,
            )

    def in_words_of_param_groups(self, message: str) -> str:
        """An op's error, whose groups are those of the call, with the places in param_groups."""
        message = re.sub(r"(?<=in group )\d+", lambda m: str(self.group_indices[int(m[0])]), message)
        return re.sub(r"\blr\[(\d+)\]", lambda m: f"lr of group {self.group_indices[int(m[1])]}", message)


class OpCalls(dict[tuple[torch.device, bool, bool], OpCall]):
    """The calls of a step, by device and way to compute; one that is missing is made."""

    def __missing__(self, key) -> OpCall:
        call = self[key] = OpCall(*key)
        return call


class TrustRatios:
    """What a call writes the trust ratios of its parameters to, as long as they stay the same."""

    def __init__(self, device: torch.device, params: list[Tensor], param_ids: list[int]) -> None:
        self.params = list(params)
        self.param_ids = param_ids
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.tensor = torch.full((len(params),), torch.nan, dtype=dtype, device=device)
        self.is_captured = False


class Workspace:
    """An op's scratch on a device, kept so that a step allocates nothing.

    The op gives it larger memory where it is too small. A captured CUDA graph, or a step on another stream,
    may still use the memory that it had, so that is kept too; since it at least doubles, that is not much.
    """

    def __init__(self, device: torch.device) -> None:
        self.tensor = torch.zeros(0, dtype=torch.int32, device=device)
        self._memory = [self.tensor.untyped_storage()]

    def after_use(self) -> None:
        memory = self.tensor.untyped_storage()
        if memory.data_ptr() != self._memory[-1].data_ptr():
            self._memory.append(memory)


class Workspaces(dict[torch.device, Workspace]):
    """One for each device; one that is missing is made."""

    def __missing__(self, device) -> Workspace:
        workspace = self[device] = Workspace(device)
        return workspace


def way_to_compute(group) -> tuple[bool, bool]:
    """Whether a group is stepped by ordinary operators, and whether autograd follows."""
    differentiable = bool(group["differentiable"])
    return bool(differentiable or group["foreach"] or group["fused"] is False), differentiable


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
        return torch.tensor(lr, dtype=torch.float64, device="cpu")
    return lr if lr.device.type == "cpu" else on_device(lr, device)
