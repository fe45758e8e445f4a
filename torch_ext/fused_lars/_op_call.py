"""The op calls of a step: one for each device and way to compute, with all parameter groups in it."""

from operator import itemgetter
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from ._checks import (
    FUSED_DEVICES,
    HALF,
    HYPERPARAMETERS,
    NUMBERS,
    SWITCHES,
    check_adaptation,
    check_hyperparameters,
    check_number,
    host_reads,
    no_fused_kernels,
)
from ._names import parameter_name

get_hyperparameters = itemgetter(*HYPERPARAMETERS)
_MASTER_WEIGHTS = HYPERPARAMETERS.index("master_weights")

# The op takes these as they are. Other types are rare.
_NUMBER_TYPES, _BOOLS = {float, int}, {True, False}


class TensorLists(NamedTuple):
    """Parameters that have a gradient, group after group, and the state that the groups' options need."""

    params: list[Tensor]
    grads: list[Tensor]
    momentum_buffers: list[Tensor]
    master_params: list[Tensor]
    steps: list[Tensor]
    momentum_scales: list[Tensor]
    rng_states: list[Tensor]


def empty_lists() -> TensorLists:
    return TensorLists(*([] for _ in TensorLists._fields))


class OpCall:
    """The arguments of one op call: all parameters on one device, group after group."""

    def __init__(self, device: torch.device, reference: bool, differentiable: bool) -> None:
        self.device = device
        self.reference = reference  # with ordinary operators instead of the fused kernels
        self.differentiable = differentiable
        self.lists = empty_lists()
        self.params = self.lists.params
        # What the op gets. In an optimizer with DTensors these are lists of their own, of local tensors.
        self.local = self.lists
        self.group_ends: list[int] = []
        self.group_indices: list[int] = []  # in param_groups
        self.hyperparameters: list[tuple] = []
        # For sharded parameters: the norms of whole tensors, and whether any rank has to skip the step.
        self.squared_norms: Tensor | None = None
        self.found_inf: Tensor | None = None
        # Where C++ has the gradients already: a PreparedNorms, and begin and end of each run of its rows.
        self.grads_taken: tuple[Any, list[int]] | None = None
        # `local` without gradients, kept in C++ for a call that is repeated.
        self._kept: Any = None  # type checkers do not know its methods

    @property
    def has_local_lists(self) -> bool:
        return self.local is not self.lists

    def add_lists(self, lists: TensorLists, local: TensorLists | None = None) -> None:
        """Adds tensors of a group. `local` is given for all groups of a call or for none."""
        if local is not None and not self.has_local_lists:
            self.local = empty_lists()
        for own, more in ((self.lists, lists), (self.local, local)):
            if more is not None:
                for tensors, more_tensors in zip(own, more):
                    tensors += more_tensors

    def end_group(self, group, index: int) -> None:
        """Ends the tensors of param_groups[index]. They begin where the group before ended."""
        self.group_ends.append(len(self.params))
        self.group_indices.append(index)
        # torch.compile does not look into an itemgetter.
        compiling = torch.compiler.is_compiling()
        values = tuple(group[name] for name in HYPERPARAMETERS) if compiling else get_hyperparameters(group)
        self.hyperparameters.append(values)

    def take_hyperparameters(self, param_groups) -> None:
        """Takes the present hyperparameters of the call's groups."""
        self.hyperparameters = [get_hyperparameters(param_groups[index]) for index in self.group_indices]

    def group_sizes(self) -> list[int]:
        return [end - begin for begin, end in zip([0, *self.group_ends], self.group_ends)]

    def masters(self):
        """Yields each parameter that has a master, with its master."""
        masters = iter(self.lists.master_params)
        begins = [0, *self.group_ends]
        for begin, end, values in zip(begins, self.group_ends, self.hyperparameters):
            if values[_MASTER_WEIGHTS]:
                yield from ((p, next(masters)) for p in self.params[begin:end] if p.dtype in HALF)

    def run(self, grad_scale, found_inf, record, workspace, check_only=False, masters_follow=False) -> None:
        """Makes the call. `record` (see _records.py) and `workspace` may be None."""
        device = self.device
        values = hyperparameter_lists(self.hyperparameters)
        overload = "default"
        # In a traced program, a number in a list is a constant and a tensor is an input.
        if torch.compiler.is_compiling() or not _NUMBER_TYPES.issuperset(map(type, values["lr"])):
            overload = self._prepare_lr(values)
        ops = torch.ops.fused_lars
        op = ops.check_step if check_only else ops.reference_step_ if self.reference else ops.step_
        if self.found_inf is not None:
            found_inf = self.found_inf
        if self._kept is not None and overload == "default" and not check_only:
            self._run_kept(
                values, on_device(grad_scale, device), on_device(found_inf, device), record, workspace
            )
            return
        with torch.set_grad_enabled(self.differentiable):
            getattr(op, overload)(
                *self.local,
                self.group_sizes(),
                **values,
                squared_norms=self.squared_norms,
                grad_scale=on_device(grad_scale, device),
                found_inf=on_device(found_inf, device),
                trust_ratios=record and record.trust_ratios,
                layer_norms=record and record.layer_norms,
                workspace=workspace,
                masters_follow=masters_follow,
            )

    def keep(self) -> None:
        """Keeps everything but the gradients for the next time that this call is made."""
        if self._kept is None and not self.reference:
            params, _, *state = self.local
            self._kept = torch.classes.fused_lars.PreparedStep(params, *state, [], self.group_sizes())
        self.squared_norms = self.found_inf = self.grads_taken = None
        self.lists.grads.clear()
        self.local.grads.clear()

    def _run_kept(self, values, grad_scale, found_inf, record, workspace) -> None:
        self._kept.set_hyperparameters([values[n] for n in NUMBERS], [values[n] for n in SWITCHES])
        others = grad_scale, found_inf, record.trust_ratios, record.layer_norms, workspace
        if self.grads_taken is not None:
            self._kept.run_after(*self.grads_taken, self.squared_norms, *others)
        else:
            self._kept.run_with(self.local.grads, self.squared_norms, *others)

    def _prepare_lr(self, values) -> str:
        """Converts learning rates of other types for the op, and returns the overload that takes them."""
        for index, lr in enumerate(values["lr"]):
            if isinstance(lr, Tensor):
                # The fused kernels check an lr that the host reads. The reference does not read it.
                if self.reference and host_reads(lr):
                    of_group = {name: of_groups[index] for name, of_groups in values.items()}
                    check_hyperparameters({**of_group, "lr": lr.item()}, index)
            else:
                check_number("lr", lr, index)
        if not (torch.compiler.is_compiling() or any(isinstance(lr, Tensor) for lr in values["lr"])):
            return "default"
        values["lr"] = [_lr_tensor(lr, self.device) for lr in values["lr"]]
        return "tensor_lr"


class OpCalls(dict[tuple[torch.device, bool, bool], OpCall]):
    """The calls of a step, by device and way to compute. A missing call is made."""

    def __missing__(self, key) -> OpCall:
        call = self[key] = OpCall(*key)
        return call


def way_to_compute(group, group_index: int, device: torch.device) -> tuple[bool, bool]:
    """Returns whether ordinary operators step a group, and whether autograd follows the step.

    Raises:
        RuntimeError: a parameter with fused=True and a gradient is on a device without fused kernels.
    """
    if group["fused"] and device.type not in FUSED_DEVICES:
        for index, p in enumerate(group["params"]):
            if p.grad is not None and p.device.type == device.type:
                raise RuntimeError(no_fused_kernels(parameter_name(group, group_index, index), device))
    return uses_ordinary_operators(group), bool(group["differentiable"])


def uses_ordinary_operators(group) -> bool:
    return bool(group["differentiable"] or group["foreach"] or group["fused"] is False)


def hyperparameter_lists(of_groups: list[tuple]) -> dict[str, list]:
    """Turns the values of each group, in the order of HYPERPARAMETERS, into the op's lists by name."""
    values = dict(zip(HYPERPARAMETERS, map(list, zip(*of_groups))))
    if not _BOOLS.issuperset(values["layer_adaptation"]):
        _resolve_adaptation(values)
    return values


def _resolve_adaptation(values) -> None:
    """Resolves layer_adaptation="decayed". A group without weight decay gets no adaptation and no clip."""
    for index, adaptation in enumerate(values["layer_adaptation"]):
        check_adaptation(adaptation, index)
        if adaptation == "decayed":
            values["layer_adaptation"][index] = is_decayed = bool(values["weight_decay"][index] > 0)
            values["trust_clip"][index] = values["trust_clip"][index] and is_decayed


@overload
def on_device(tensor: Tensor, device: torch.device) -> Tensor: ...


@overload
def on_device(tensor: None, device: torch.device) -> None: ...


def on_device(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    """Returns a scalar on the device where a step reads it. The copy blocks only if the host will read it."""
    return None if tensor is None else tensor.to(device, non_blocking=device.type != "cpu")


def _lr_tensor(lr: float | Tensor, device: torch.device) -> Tensor:
    """An lr as the op's tensor_lr overload takes it: on the CPU or on the parameters' device."""
    if not isinstance(lr, Tensor):
        return torch.tensor(lr, dtype=torch.float64, device="cpu")
    return lr if lr.device.type == "cpu" else on_device(lr, device)
