"""The calls of the op that a step makes: their lists, and what outlives a step."""

import re
from operator import is_, itemgetter
from typing import Any, overload

import torch
from torch import Tensor

from .checks import (
    FUSED_DEVICES,
    HALF,
    HYPERPARAMETERS,
    NUMBERS,
    STATE,
    SWITCHES,
    check_adaptation,
    check_hyperparameters,
    check_number,
    host_reads,
    no_fused_kernels,
)

_get_hyperparameters = itemgetter(*HYPERPARAMETERS)

# What the op takes as it is; most often nothing is there but these.
_NUMBER_TYPES, _BOOLS = {float, int}, {True, False}


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
        # The lists but for gradients, kept in C++ for a call that is made again.
        self._kept: Any = None  # of torch.classes, whose methods no type checker knows

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
        # torch.compile does not look into an itemgetter.
        compiling = torch.compiler.is_compiling()
        values = tuple(group[name] for name in HYPERPARAMETERS) if compiling else _get_hyperparameters(group)
        self.hyperparameters.append(values)

    def take_hyperparameters(self, param_groups) -> None:
        """Takes what the call's groups have now."""
        self.hyperparameters = [_get_hyperparameters(param_groups[index]) for index in self.group_indices]

    def group_sizes(self) -> list[int]:
        return [end - begin for begin, end in zip([0, *self.group_ends], self.group_ends)]

    def masters(self):
        """Pairs of a parameter that has a master and the master."""
        masters = iter(self.master_params)
        begins = [0, *self.group_ends]
        for begin, end, values in zip(begins, self.group_ends, self.hyperparameters):
            if values[-1]:  # master_weights
                yield from ((p, next(masters)) for p in self.params[begin:end] if p.dtype in HALF)

    def run(self, grad_scale, found_inf, record, workspace, check_only=False) -> None:
        """Makes the call; `record`, see records.py, and `workspace` may be None."""
        device = self.device
        values = hyperparameter_lists(self.hyperparameters)
        overload = "default"
        # A trace takes a number of a list for a constant, and a tensor for an input.
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
                *(self.local or self.lists),
                self.group_sizes(),
                **values,
                squared_norms=self.squared_norms,
                grad_scale=on_device(grad_scale, device),
                found_inf=on_device(found_inf, device),
                trust_ratios=record and record.trust_ratios,
                layer_norms=record and record.layer_norms,
                workspace=workspace,
            )

    def keep(self) -> None:
        """Keeps local tensors and their order, but no gradients, for the next time that this call is made."""
        assert self.local is not None  # only calls of sharding.py are kept
        if self._kept is None and not self.reference:
            params, _, *state = self.local
            self._kept = torch.classes.fused_lars.PreparedStep(params, *state, [], self.group_sizes())
        self.squared_norms = self.found_inf = None
        self.grads.clear()
        self.local[1].clear()

    def _run_kept(self, values, grad_scale, found_inf, record, workspace) -> None:
        assert self.local is not None
        self._kept.set_hyperparameters([values[n] for n in NUMBERS], [values[n] for n in SWITCHES])
        self._kept.run_with(
            self.local[1],
            self.squared_norms,
            grad_scale,
            found_inf,
            record.trust_ratios,
            record.layer_norms,
            workspace,
        )

    def _prepare_lr(self, values) -> str:
        """Learning rates of other types, as the op takes them; returns the overload that does."""
        for index, lr in enumerate(values["lr"]):
            if isinstance(lr, Tensor):
                # The fused kernels check what the host reads; the reference does not read.
                if self.reference and host_reads(lr):
                    of_group = {name: of_groups[index] for name, of_groups in values.items()}
                    check_hyperparameters({**of_group, "lr": lr.item()}, index)
            else:
                check_number("lr", lr, index)
        if not (torch.compiler.is_compiling() or any(isinstance(lr, Tensor) for lr in values["lr"])):
            return "default"
        values["lr"] = [_lr_tensor(lr, self.device) for lr in values["lr"]]
        return "tensor_lr"

    def in_words_of_param_groups(self, message: str, param_groups, state) -> str:
        """An op's error, which knows places in this call, with the groups and the parameter that it means."""
        text = re.sub(r"(?<=in group )\d+", lambda m: str(self.group_indices[int(m[0])]), message)
        text = re.sub(r"\blr\[(\d+)\]", lambda m: f"lr of group {self.group_indices[int(m[1])]}", text)
        found = re.match(r"(\w+)\[(\d+)\]", message)
        if not found or not isinstance(getattr(self, found[1], None), list):
            return text
        tensor = getattr(self, found[1])[int(found[2])]
        for group_index, group in enumerate(param_groups):
            for index, p in enumerate(group["params"]):
                if any(tensor is t for t in (p, p.grad, *state.get(p, {}).values())):
                    return f"{text} ({parameter_name(group, group_index, index)})"
        return text


class SameParams:
    """Whether an optimizer still has the same parameters in the same groups, by identity."""

    def __init__(self, param_groups) -> None:
        self.of_groups = [[*group["params"]] for group in param_groups]

    def are_still(self, param_groups) -> bool:
        if len(param_groups) != len(self.of_groups):
            return False
        return all(
            len(group["params"]) == len(params) and all(map(is_, group["params"], params))
            for group, params in zip(param_groups, self.of_groups)
        )


class SameState:
    """Whether an optimizer still keeps the same tensors for the same parameters, by identity."""

    def __init__(self, state) -> None:
        self._params = [*state]
        keys = [key for key in STATE if any(key in values for values in state.values())]
        # KeyError: parameters that keep different kinds of state.
        self._tensors = [(get, [*map(get, state.values())]) for get in map(itemgetter, keys)]

    def is_still(self, state) -> bool:
        if len(state) != len(self._params) or not all(map(is_, state, self._params)):
            return False
        try:
            return all(all(map(is_, map(get, state.values()), tensors)) for get, tensors in self._tensors)
        except KeyError:
            return False


class OpCalls(dict[tuple[torch.device, bool, bool], OpCall]):
    """The calls of a step, by device and way to compute; one that is missing is made."""

    def __missing__(self, key) -> OpCall:
        call = self[key] = OpCall(*key)
        return call


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


def way_to_compute(group, group_index: int, device: torch.device) -> tuple[bool, bool]:
    """Whether a group is stepped by ordinary operators, and whether autograd follows.

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
    """The op's lists of hyperparameters by name, from those of each group in the order of HYPERPARAMETERS."""
    values = dict(zip(HYPERPARAMETERS, map(list, zip(*of_groups))))
    if not _BOOLS.issuperset(values["layer_adaptation"]):
        _resolve_adaptation(values)
    return values


def _resolve_adaptation(values) -> None:
    """layer_adaptation="decayed": where nothing is decayed the step is plain, without a clip too."""
    for index, adaptation in enumerate(values["layer_adaptation"]):
        check_adaptation(adaptation, index)
        if adaptation == "decayed":
            values["layer_adaptation"][index] = is_decayed = bool(values["weight_decay"][index] > 0)
            values["trust_clip"][index] = values["trust_clip"][index] and is_decayed


def parameter_name(group, group_index: int, index: int) -> str:
    """A parameter's name in an error."""
    name = name_in_group(group, index)
    return f"parameter{'' if name is None else f' {name!r},'} {place_of(group_index, index)}"


def name_in_group(group, index: int) -> str | None:
    """None for a parameter that was given without a name, or put into the list later."""
    names = group.get("param_names", ())
    return names[index] if index < len(names) else None


def place_of(group_index: int, index: int) -> str:
    """Where a parameter stands in an optimizer."""
    return f"param_groups[{group_index}]['params'][{index}]"


@overload
def on_device(tensor: Tensor, device: torch.device) -> Tensor: ...


@overload
def on_device(tensor: None, device: torch.device) -> None: ...


def on_device(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    """A scalar where a step reads it; the copy does not block, unless it is the host that will read."""
    return None if tensor is None else tensor.to(device, non_blocking=device.type != "cpu")


def _lr_tensor(lr: float | Tensor, device: torch.device) -> Tensor:
    """An lr as the op's tensor_lr overload takes it: on the CPU or on the parameters' device."""
    if not isinstance(lr, Tensor):
        return torch.tensor(lr, dtype=torch.float64, device="cpu")
    return lr if lr.device.type == "cpu" else on_device(lr, device)
