"""The op calls of a sharded step and their norms, kept from one step to the next."""

from collections import defaultdict
from functools import partial
from operator import is_, is_not

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from .._gather import append_group
from .._op_call import OpCalls, TensorLists, empty_lists, on_device, way_to_compute
from .._prepared_step import needs
from .._same import SameState
from .._step_inputs import StepInputs
from .._torch_internals import get_local, get_spec, without_torch_function
from .norm_rows import NormRows
from .placements import is_placed_as, replaced_grads
from .rank_sets import RankSet


class Gathered:
    """The op calls of a step and their norms, which can be repeated with other gradients.

    Gathering them takes the host longer than the rest of a step. Between two steps of a training run only
    gradients and numbers change. Comparing tensors by identity shows whether that is so.
    """

    def __init__(self, rank_sets: list[RankSet], dtensors: list[DTensor], inputs: StepInputs) -> None:
        self.calls = OpCalls()
        self.norms: dict[torch.device, NormRows] = {}
        self.is_renewed = False
        self._rank_sets = rank_sets
        replaced = replaced_grads(dtensors, inputs.param_groups)
        self._has_own_grads = not replaced  # no gradient had to be redistributed
        for rank_set in rank_sets:
            device = rank_set.device
            if device not in self.norms:
                self.norms[device] = NormRows(*_on_device(inputs, device))
            for index, params in rank_set.parts.items():
                self._add(rank_set, index, params, replaced, inputs)
            self.norms[device].end(rank_set.peers)

    def _add(self, rank_set: RankSet, index: int, params: list[Tensor], replaced, inputs) -> None:
        """Adds the parameters of param_groups[index] that a set of ranks shares."""
        group, device, is_shared = inputs.param_groups[index], rank_set.device, rank_set.peers is not None
        if group["differentiable"] and is_shared:
            raise ValueError(
                f"param_groups[{index}] has differentiable=True and sharded parameters, "
                "whose norms autograd cannot follow from rank to rank; allowed: fused, foreach"
            )
        lists = empty_lists()
        append_group({**group, "params": params}, inputs.param_groups, inputs.state, *lists)
        local = lists
        if rank_set.is_dtensor:
            local = TensorLists._make([*([*map(get_local, tensors)] for tensors in lists[:4]), *lists[4:]])
            if replaced:
                local.grads[:] = [replaced.get(p, grad) for p, grad in zip(lists.params, local.grads)]
        call = self.calls[(device, *way_to_compute(group, index, device))]
        call.add_lists(lists, local)
        call.end_group(group, index)
        self.norms[device].add(call, index, params, local, is_shared, inputs.state)

    def keep(self, inputs: StepInputs) -> bool:
        """Keeps everything but gradients for the next step. Returns False if that must be gathered again."""
        if not self.is_renewed and not self._look_at(inputs):
            return False
        for call in self.calls.values():
            call.keep()
        for norms in self.norms.values():
            norms.keep()
        return True

    def _look_at(self, inputs: StepInputs) -> bool:
        """Remembers what must be the same in the next step.

        Returns False if gradients are missing or replaced, or if parameters keep different kinds of state.
        """
        self._parts = [
            _Part(rank_set, index, params)
            for rank_set in self._rank_sets
            for index, params in rank_set.parts.items()
        ]
        called = sum(len(call.params) for call in self.calls.values())
        if not self._has_own_grads or called != sum(len(part.params) for part in self._parts):
            return False  # some have no gradient
        self._needs = [*map(needs, inputs.param_groups)]
        try:
            self._state = SameState(inputs.state)
        except KeyError:
            return False
        return True

    def renew(self, inputs: StepInputs) -> bool:
        """Takes the parameters' present gradients. Returns False if anything else has changed."""
        groups = inputs.param_groups
        if [*map(needs, groups)] != self._needs or not self._state.is_still(inputs.state):
            return False
        grads = []
        for part in self._parts:
            with without_torch_function():
                own = [p.grad for p in part.params]
            local = part.local_grads(own)
            if local is None:
                return False
            grads.append((own, local))
        rows: defaultdict[int, list[Tensor]] = defaultdict(list)  # of each set of ranks
        for part, (own, local) in zip(self._parts, grads):
            device = part.rank_set.device
            call = self.calls[(device, *way_to_compute(groups[part.index], part.index, device))]
            call.lists.grads.extend(own)
            call.local.grads.extend(local)
            rows[id(part.rank_set)] += local
        for device, norms in self.norms.items():
            of_sets = [rows[id(rank_set)] for rank_set in self._rank_sets if rank_set.device == device]
            norms.renew(of_sets, *_on_device(inputs, device))
        for call in self.calls.values():
            call.take_hyperparameters(groups)
        self.is_renewed = True
        return True


class _Part:
    """The parameters of a group that one set of ranks shares, as they were when gathered."""

    def __init__(self, rank_set: RankSet, index: int, params: list[Tensor]) -> None:
        self.rank_set, self.index, self.params = rank_set, index, params  # index: in param_groups
        if rank_set.is_dtensor:
            self._local, self._specs = [*map(get_local, params)], [*map(get_spec, params)]

    def local_grads(self, grads: list) -> list[Tensor] | None:
        """Returns the local tensors of the gradients.

        Returns None if a gradient is missing or is not placed like its parameter, or if the local tensor of a
        parameter was replaced.
        """
        if not self.rank_set.is_dtensor:
            return grads if all(map(_is_there, grads)) else None
        if not all(map(is_, map(get_local, self.params), self._local)):
            return None
        try:
            specs = [*map(get_spec, grads)]
        except AttributeError:  # None, or not a DTensor
            return None
        # fully_shard gives a gradient the same spec object as its parameter.
        if not all(map(is_, specs, self._specs)) and not all(map(is_placed_as, specs, self._specs)):
            return None
        return [*map(get_local, grads)]


_is_there = partial(is_not, None)


def _on_device(inputs: StepInputs, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    return on_device(inputs.grad_scale, device), on_device(inputs.found_inf, device)
