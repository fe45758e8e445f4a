"""The sharded step of an optimizer: what it sends to the other ranks, in which order, and their answers."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from .._checks import HYPERPARAMETERS, are_hyperparameters, check_group
from .._names import parameter_name
from .._op_call import OpCalls
from .._run_call import run_call
from .._same import SameParams
from .._step_inputs import StepInputs
from .._torch_internals import FSDP1_FLATTENED
from .._workspace import Workspaces
from .gathered import Gathered
from .peers import Exchange, Peers, raise_first
from .rank_sets import RankSet, sorted_by_ranks


def has_dtensors(group, group_index: int) -> bool:
    """Whether a parameter group holds DTensors.

    Raises:
        ValueError: a parameter has no norm of a layer, as it is a Partial DTensor or flattened by FSDP1.
    """
    found = False
    for index, param in enumerate(group["params"]):
        if getattr(param, FSDP1_FLATTENED, False):
            raise ValueError(
                f"{parameter_name(group, group_index, index)} is a flat parameter of "
                "FullyShardedDataParallel (FSDP1) or a view of one and has no norm of a layer; use "
                "torch.distributed.fsdp.fully_shard (FSDP2)"
            )
        if isinstance(param, DTensor):
            found = True
            if any(placement.is_partial() for placement in param.placements):
                raise ValueError(
                    f"{parameter_name(group, group_index, index)} has placements {param.placements}; "
                    "allowed: Shard and Replicate (Partial is a sum that has not been taken yet: "
                    "redistribute it)"
                )
    return found


def check_sharding(saved_id, key: str, value: Tensor, param: Tensor) -> None:
    """Checks that a state tensor of a state_dict is sharded like its parameter."""

    def sharding(tensor):
        return f"{tensor.placements} on {tensor.device_mesh}" if isinstance(tensor, DTensor) else "no DTensor"

    if sharding(value) != sharding(param):
        raise ValueError(
            f"{key} of parameter {saved_id} in the state_dict is {sharding(value)}; expected what the "
            f"parameter is, {sharding(param)}. To reshard a state there is set_optimizer_state_dict of "
            "torch.distributed.checkpoint.state_dict"
        )


class Sharding:
    """Makes the op calls of an optimizer that has DTensor parameters."""

    def __init__(self) -> None:
        self._params: SameParams | None = None
        self._dtensors: list[DTensor] = []
        self._rank_sets: list[RankSet] = []  # in the order of their messages, by device
        self._peers: list[Peers] = []
        self._world: dist.ProcessGroup | None = None
        self._checked: list = []
        self._exchange = Exchange()
        self._gathered: Gathered | None = None  # the last step, if it can be repeated
        self._workspaces = Workspaces()

    def look_at(self, inputs: StepInputs) -> None:
        """Checks that the step before succeeded on all ranks, and that they have the same parameters.

        Raises:
            ValueError: the ranks that share parameters do not step them alike.
            RuntimeError: another rank cannot step.
        """
        self._exchange.look_back()
        self._update(inputs.param_groups, _given(inputs))

    def gather(self, inputs: StepInputs) -> Gathered:
        """Gathers the calls of a step: local tensors with norms of whole ones.

        Only the caller keeps them, so this object holds no gradient of a step that fails.

        Raises:
            ValueError: this rank cannot step, or the ranks that share parameters do not step them alike.
            RuntimeError: another rank cannot step.
        """
        if inputs.found_inf is not None and not isinstance(inputs.found_inf, Tensor):
            # GradScaler gives the number 0 if no parameter has a gradient.
            inputs = inputs._replace(found_inf=torch.tensor(float(inputs.found_inf)))
        gathered, self._gathered = self._gathered, None
        try:
            _set_options(self._rank_sets, inputs.param_groups, _given(inputs))
            if gathered is None or not gathered.renew(inputs):
                gathered = Gathered(self._rank_sets, self._dtensors, inputs)
            self._take_norms(inputs, gathered)
        except Exception as error:
            self._exchange.raise_everywhere(error, self._peers)
        norms = gathered.norms.values()
        self._exchange.add_up([message for of_device in norms for message in of_device.messages()])
        for of_device in norms:
            of_device.hand_out()
        return gathered

    def after_step(self, inputs: StepInputs, gathered: Gathered) -> None:
        # Autograd must notice the change, as it would after an operator on the DTensor itself.
        dtensors = self._dtensors
        if not gathered.is_renewed:
            dtensors = [p for p in dtensors if p.grad is not None]
        torch.autograd.graph.increment_version(dtensors)
        if gathered.keep(inputs):
            self._gathered = gathered

    def _take_norms(self, inputs: StepInputs, gathered: Gathered) -> None:
        if not self._peers:
            return
        # The norms op does not see the state. So the step's checks of the state run before the other ranks
        # are told that this one steps. They do not run again while the state is the same.
        calls = gathered.calls
        is_plain = all(
            are_hyperparameters(values) for call in calls.values() for values in call.hyperparameters
        )
        if not is_plain:
            _check(inputs, calls)
        elif not gathered.is_renewed:
            state = [id(t) for call in calls.values() for tensors in call.local[2:] for t in tensors]
            if state != self._checked:
                _check(inputs, calls)
                self._checked = state
        for device, of_device in gathered.norms.items():
            try:
                of_device.take(self._workspaces[device], inputs.param_groups)
            except (RuntimeError, TypeError, ValueError):
                _check(inputs, calls)  # its error names the parameter
                raise

    def _update(self, param_groups, given: dict[str, bool]) -> None:
        """Sorts the parameters by the ranks that share them, unless they are those of the step before."""
        is_sorted = self._params is not None and self._params.are_still(param_groups)
        if is_sorted and not any(rank_set.has_moved() for rank_set in self._rank_sets):
            return
        if self._world is dist.group.WORLD:
            # The other ranks may be about to send norms of the parameters that this one had before.
            self._exchange.announce_other_params(self._peers)
        rank_sets, error = sorted_by_ranks(param_groups), None
        try:
            _set_options(rank_sets, param_groups, given)
        except Exception as caught:
            error = caught
        all_peers = [rank_set.peers for rank_set in rank_sets if rank_set.peers is not None]
        raise_first([error, *(peers.disagreement(error) for peers in all_peers)])
        self._rank_sets, self._peers, self._checked = rank_sets, all_peers, []
        self._params, self._gathered = SameParams(param_groups), None
        self._world = dist.group.WORLD
        params = (p for group in param_groups for p in group["params"])
        self._dtensors = [p for p in params if isinstance(p, DTensor) and p.device_mesh.get_coordinate()]


def _given(inputs: StepInputs) -> dict[str, bool]:
    """Which tensors a GradScaler has given. They decide whether to step, and what divides gradients."""
    return {"found_inf": inputs.found_inf is not None, "grad_scale": inputs.grad_scale is not None}


def _check(inputs: StepInputs, calls: OpCalls) -> None:
    inputs = inputs._replace(grad_scale=None, found_inf=None)
    for call in calls.values():
        if call.params:
            run_call(call, inputs, None, None, check_only=True)


def _set_options(rank_sets: list[RankSet], param_groups, given: dict[str, bool]) -> None:
    for index, group in enumerate(param_groups):
        if not are_hyperparameters([group[name] for name in HYPERPARAMETERS]):
            check_group(group, index)  # before a tensor or a string is taken for a number
    for rank_set in rank_sets:
        if rank_set.peers is not None:
            rank_set.peers.set_options([param_groups[index] for index in rank_set.parts], given)
