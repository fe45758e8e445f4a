"""DTensor parameters: a rank steps its shards, with norms of the whole that one small all-reduce gives.

What a rank sends follows from what all ranks of a mesh know alike (the parameters, their meshes and
placements) and never from what it happens to hold, so that no empty shard or missing gradient makes a rank
wait for ever. That they do know it alike is seen to by peers.py.
"""

import math
from collections import defaultdict
from dataclasses import dataclass, field
from functools import partial
from operator import attrgetter, is_, is_not
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from .checks import HYPERPARAMETERS, are_hyperparameters, check_group
from .norm_rows import NormRows
from .op_call import OpCalls, SameParams, SameState, Workspaces, on_device, parameter_name, way_to_compute
from .peers import Exchange, Peers, raise_first
from .prepared_step import get_options, needs

_FLATTENED = "_fsdp_flattened"  # FSDP1's mark on flat parameters, and on parameters that are views of them


def has_dtensors(group, group_index: int) -> bool:
    """Whether a parameter group holds DTensors.

    Raises:
        ValueError: a parameter that has no norm of a layer: a Partial DTensor, or what FSDP1 has flattened.
    """
    found = False
    for index, param in enumerate(group["params"]):
        if getattr(param, _FLATTENED, False):
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


def check_state(saved_id, key: str, value: Tensor, param: Tensor) -> None:
    """Checks that a state tensor of a state_dict is sharded as its parameter is."""

    def sharding(tensor):
        return f"{tensor.placements} on {tensor.device_mesh}" if isinstance(tensor, DTensor) else "no DTensor"

    if sharding(value) != sharding(param):
        raise ValueError(
            f"{key} of parameter {saved_id} in the state_dict is {sharding(value)}; expected what the "
            f"parameter is, {sharding(param)}. To reshard a state there is set_optimizer_state_dict of "
            "torch.distributed.checkpoint.state_dict"
        )


@dataclass
class _RankSet:
    """Parameters on one device that the same ranks hold the shards of."""

    device: torch.device
    is_dtensor: bool
    peers: Peers | None = None  # None: this rank has them whole
    parts: dict[int, list[Tensor]] = field(default_factory=lambda: defaultdict(list))  # by parameter group

    def has_moved(self) -> bool:
        param: Any = next(iter(self.parts.values()))[0]
        return (param._local_tensor if self.is_dtensor else param).device != self.device


class Sharding:
    """Gathers the op calls of an optimizer that has DTensor parameters."""

    def __init__(self) -> None:
        self._params: SameParams | None = None
        self._dtensors: list[DTensor] = []
        self._rank_sets: list[_RankSet] = []  # in the order of their messages, by device
        self._peers: list[Peers] = []
        self._world: dist.ProcessGroup | None = None
        self._checked: list = []
        self._exchange = Exchange()
        self._gathered: _Gathered | None = None  # of the last step, once it was made
        self._in_step: _Gathered | None = None
        self._workspaces = Workspaces()

    def calls(self, optimizer, found_inf: Tensor | None) -> OpCalls:
        """The calls of a step, by device and implementation: local tensors, with norms of whole tensors.

        Raises:
            ValueError: this rank cannot step, or the ranks that share parameters do not step them alike.
            RuntimeError: another rank cannot step.
        """
        if found_inf is not None and not isinstance(found_inf, Tensor):
            found_inf = torch.tensor(float(found_inf))  # GradScaler's 0 where nothing has a gradient
        # What AMP gives decides whether a step is taken, and what its gradients are divided by.
        given = {"found_inf": found_inf is not None, "grad_scale": hasattr(optimizer, "grad_scale")}
        self._exchange.look_back()
        self._update(optimizer.param_groups, given)
        optimizer._written_params.before_step(optimizer.param_groups, optimizer.state)
        gathered, self._gathered = self._gathered, None
        error = None
        try:
            _set_options(self._rank_sets, optimizer.param_groups, given)
            if gathered is None or not gathered.renew(optimizer, found_inf):
                gathered = _Gathered(self._rank_sets)
                self._gather(optimizer, found_inf, gathered)
            self._take_norms(optimizer, gathered)
        except Exception as caught:
            error = caught
        if error is None:
            norms = gathered.norms.values()
            self._exchange.add_up([message for of_device in norms for message in of_device.messages()])
        else:
            self._exchange.raise_everywhere(error, self._peers)
        for of_device in gathered.norms.values():
            of_device.hand_out()
        self._in_step = gathered
        return gathered.calls

    def after_step(self, optimizer) -> None:
        # For autograd, as an operator on the DTensor itself would count it.
        gathered, self._in_step = self._in_step, None
        dtensors = self._dtensors
        if not gathered.is_renewed:
            dtensors = [p for p in dtensors if p.grad is not None]
        torch.autograd.graph.increment_version(dtensors)
        if gathered.keep(optimizer):
            self._gathered = gathered

    def _gather(self, optimizer, found_inf, gathered: "_Gathered") -> None:
        calls, norms = gathered.calls, gathered.norms
        replaced = _replaced_grads(self._dtensors, optimizer.param_groups)
        gathered.has_own_grads = not replaced
        for rank_set in self._rank_sets:
            device = rank_set.device
            if device not in norms:
                grad_scale = on_device(getattr(optimizer, "grad_scale", None), device)
                norms[device] = NormRows(on_device(found_inf, device), grad_scale)
            for group_index, params in rank_set.parts.items():
                group = optimizer.param_groups[group_index]
                if group["differentiable"] and rank_set.peers is not None:
                    raise ValueError(
                        f"param_groups[{group_index}] has differentiable=True and sharded parameters, "
                        "whose norms autograd cannot follow from rank to rank; allowed: fused, foreach"
                    )
                lists: tuple[list[Any], ...] = ([], [], [], [], [])
                optimizer._init_group({**group, "params": params}, *lists)
                local = lists
                if rank_set.is_dtensor:
                    local = (*([t._local_tensor for t in tensors] for tensors in lists[:4]), lists[4])
                    if replaced:
                        local[1][:] = [replaced.get(p, grad) for p, grad in zip(lists[0], local[1])]
                call = calls[(device, *way_to_compute(group, group_index, device))]
                call.add_lists(lists, local)
                call.end_group(group, group_index)
                is_shared = rank_set.peers is not None
                norms[device].add(call, group_index, params, local, is_shared, optimizer.state)
            norms[device].end(rank_set.peers)

    def _take_norms(self, optimizer, gathered: "_Gathered") -> None:
        calls, norms = gathered.calls, gathered.norms
        if not self._peers:
            return
        # What the step alone would refuse, state, is found before the other ranks are told that this one
        # steps, where it is not that of the last time. The norms op sees everything else.
        is_plain = all(
            are_hyperparameters(values) for call in calls.values() for values in call.hyperparameters
        )
        if not is_plain:
            self._check(optimizer, calls)
        elif not gathered.is_renewed:
            state = [id(t) for call in calls.values() for tensors in call.local[2:] for t in tensors]
            if state != self._checked:
                self._check(optimizer, calls)
                self._checked = state
        for device, of_device in norms.items():
            try:
                of_device.take(self._workspaces[device], optimizer.param_groups)
            except (RuntimeError, TypeError, ValueError):
                self._check(optimizer, calls)  # which knows the parameter's name
                raise

    def _check(self, optimizer, calls: OpCalls) -> None:
        for call in calls.values():
            if call.params:
                optimizer._run(call, None, None, None, None, check_only=True)

    def _update(self, param_groups, given: dict[str, bool]) -> None:
        """Sorts the parameters by the ranks that share them, where they are not those of the step before."""
        is_sorted = self._params is not None and self._params.are_still(param_groups)
        if is_sorted and not any(rank_set.has_moved() for rank_set in self._rank_sets):
            return
        if self._world is dist.group.WORLD:
            # The other ranks may be about to send the norms of what this one had before.
            self._exchange.announce_other_params(self._peers)
        rank_sets, error = _sorted_by_ranks(param_groups), None
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


class _Gathered:
    """The op calls of a step and the norms for them, to be made again with other gradients.

    To gather them takes the host longer than all the rest of a step, and between two steps of a training run
    nothing but gradients and numbers changes. That is seen by identity.
    """

    def __init__(self, rank_sets: list[_RankSet]) -> None:
        self.calls = OpCalls()
        self.norms: dict[torch.device, NormRows] = {}
        self.has_own_grads = True  # those of the parameters, none in their place
        self.is_renewed = False
        self._rank_sets = rank_sets

    def keep(self, optimizer) -> bool:
        """Keeps what the next step may need, no gradients. Returns False if that is to be gathered anew."""
        if not self.is_renewed and not self._look_at(optimizer):
            return False
        for call in self.calls.values():
            call.keep()
        for norms in self.norms.values():
            norms.keep()
        return True

    def _look_at(self, optimizer) -> bool:
        """What must be the same in the next step. Returns False if gradients are missing or replaced."""
        self._parts = [
            _Part(rank_set, index, params)
            for rank_set in self._rank_sets
            for index, params in rank_set.parts.items()
        ]
        called = sum(len(call.params) for call in self.calls.values())
        if not self.has_own_grads or called != sum(len(part.params) for part in self._parts):
            return False  # some have no gradient
        self._needs = [*map(needs, map(get_options, optimizer.param_groups))]
        try:
            self._state = SameState(optimizer.state)
        except KeyError:
            return False
        return True

    def renew(self, optimizer, found_inf: Tensor | None) -> bool:
        """Takes the parameters' present gradients. Returns False if this is another step than the last."""
        groups = optimizer.param_groups
        if [*map(needs, map(get_options, groups))] != self._needs or not self._state.is_still(
            optimizer.state
        ):
            return False
        grads = []
        for part in self._parts:
            own = [p.grad for p in part.params]
            local = part.local_grads(own)
            if local is None:
                return False
            grads.append((own, local))
        rows: defaultdict[int, list[Tensor]] = defaultdict(list)  # of each set of ranks
        for part, (own, local) in zip(self._parts, grads):
            device = part.rank_set.device
            call = self.calls[(device, *way_to_compute(groups[part.index], part.index, device))]
            call.grads.extend(own)
            call.local[1].extend(local)
            rows[id(part.rank_set)] += local
        for device, norms in self.norms.items():
            of_sets = [rows[id(rank_set)] for rank_set in self._rank_sets if rank_set.device == device]
            grad_scale = on_device(getattr(optimizer, "grad_scale", None), device)
            norms.renew(of_sets, on_device(found_inf, device), grad_scale)
        for call in self.calls.values():
            call.take_hyperparameters(groups)
        self.is_renewed = True
        return True


class _Part:
    """The parameters of a group that one set of ranks shares, as they were when they were gathered."""

    def __init__(self, rank_set: _RankSet, index: int, params: list[Tensor]) -> None:
        self.rank_set, self.index, self.params = rank_set, index, params  # index: in param_groups
        if rank_set.is_dtensor:
            self._local, self._specs = [*map(_get_local, params)], [*map(_get_spec, params)]

    def local_grads(self, grads: list) -> list[Tensor] | None:
        """What this rank holds of the gradients.

        None where a gradient is missing or is not placed as its parameter is, or where a parameter holds
        another tensor than before.
        """
        if not self.rank_set.is_dtensor:
            return grads if all(map(_is_there, grads)) else None
        if not all(map(is_, map(_get_local, self.params), self._local)):
            return None
        try:
            specs = [*map(_get_spec, grads)]
        except AttributeError:  # None, or no DTensor
            return None
        # fully_shard gives gradients the very spec of the parameter.
        if not all(map(is_, specs, self._specs)) and not all(map(_is_placed_as, specs, self._specs)):
            return None
        return [*map(_get_local, grads)]


_get_local, _get_spec = attrgetter("_local_tensor"), attrgetter("_spec")
_is_there = partial(is_not, None)


def _is_placed_as(got, spec) -> bool:
    return got is spec or (got.mesh is spec.mesh and got.placements == spec.placements)


def _set_options(rank_sets: list[_RankSet], param_groups, given: dict[str, bool]) -> None:
    for index, group in enumerate(param_groups):
        if not are_hyperparameters([group[name] for name in HYPERPARAMETERS]):
            check_group(group, index)  # before a tensor or a text is taken for a number
    for rank_set in rank_sets:
        if rank_set.peers is not None:
            rank_set.peers.set_options([param_groups[index] for index in rank_set.parts], given)


def _sorted_by_ranks(param_groups) -> list[_RankSet]:
    """The parameters of all groups by the ranks that share them, in the order of their messages."""
    rank_sets: dict[tuple, _RankSet] = {}
    reached: dict[tuple, tuple] = {}
    lines: defaultdict[tuple, list[str]] = defaultdict(list)
    for group_index, group in enumerate(param_groups):
        for index, p in enumerate(group["params"]):
            device, is_dtensor = p.device, False
            ranks: tuple[int, ...] = ()
            if isinstance(p, DTensor):
                mesh = p.device_mesh
                if mesh.get_coordinate() is None:
                    continue  # all of it is on other ranks
                device, is_dtensor = p._local_tensor.device, True
                dims = [d for d, x in enumerate(p.placements) if mesh.size(d) > 1 and not x.is_replicate()]
                if dims and device.type != "meta":  # which has no values to add up
                    ranks, groups = _ranks_and_groups(mesh, tuple(dims))
            # Sorted, it is the order of their messages, which is the same on all ranks.
            key = (device.type, ranks, is_dtensor, str(device))
            rank_sets.setdefault(key, _RankSet(device, is_dtensor)).parts[group_index].append(p)
            if ranks:
                # NCCL alone, with parameters that fully_shard has offloaded to the CPU.
                has_backend = f"{device.type}:" in dist.get_backend_config(groups[0])
                reached[key] = groups, device, None if has_backend else torch.device(mesh.device_type)
                name = f"{group['param_names'][index]!r}, " if "param_names" in group else ""
                lines[key].append(f"{name}{p.dtype} {tuple(p.shape)} {p.placements}")
    for key, (groups, device, staging) in reached.items():
        sizes = [*map(len, rank_sets[key].parts.values())]
        rank_sets[key].peers = Peers(key[1], groups, device, staging, lines[key], sizes)
    return [rank_sets[key] for key in sorted(rank_sets)]


def _replaced_grads(params: list[DTensor], param_groups) -> dict[DTensor, Tensor]:
    """Local gradients of the parameters whose gradients are placed otherwise than they are themselves.

    Sequence parallelism, for one, leaves the gradients of replicated parameters Partial. Those that wait for
    the same reduction share it. The gradients themselves are left as they are.
    """
    placed_otherwise = []
    for p in params:
        grad: Any = p.grad
        if grad is None:
            continue
        spec = p._spec
        got = getattr(grad, "_spec", None)
        if got is not None and _is_placed_as(got, spec):
            continue
        if got is None or got.mesh != spec.mesh:
            got = f"on {grad.device_mesh}" if isinstance(grad, DTensor) else "no DTensor"
            raise ValueError(
                f"the gradient of {_name_of(p, param_groups)} is {got}; expected a DTensor on {p.device_mesh}"
            )
        if got.placements != spec.placements:
            placed_otherwise.append(p)
    # Nothing is sent before all is checked, so that this rank takes part in all of it or in nothing.
    result: dict[DTensor, Tensor] = {}
    partial: defaultdict[tuple, list[DTensor]] = defaultdict(list)
    for p in placed_otherwise:
        grad = p.grad
        pairs = tuple(zip(grad.placements, p.placements))
        if all(got == wanted or (got.is_partial() and wanted.is_replicate()) for got, wanted in pairs):
            partial[p.device_mesh, pairs, grad.dtype].append(p)
        else:
            result[p] = grad.redistribute(placements=p.placements)._local_tensor
    for (mesh, pairs, _), members in partial.items():
        grads = [_get_local(p.grad) for p in members]
        # The local elements of all, as one tensor that is Partial where they are.
        placements = [got if got.is_partial() else Replicate() for got, _ in pairs]
        flat = torch.cat([grad.reshape(-1) for grad in grads])
        flat = DTensor.from_local(flat, mesh, placements, run_check=False)
        flat = flat.redistribute(placements=[Replicate()] * mesh.ndim)._local_tensor
        pieces = flat.split([grad.numel() for grad in grads])
        result.update((p, piece.view(grad.shape)) for p, piece, grad in zip(members, pieces, grads))
    return result


def _ranks_and_groups(mesh, dims: tuple[int, ...]) -> tuple[tuple[int, ...], tuple]:
    """The ranks that differ from this one in `dims` of a mesh only, sorted, and process groups to sum over.

    No group is made: all ranks of the job would have to make it at once, and those of other stages of a
    pipeline are not here.
    """
    ranks = mesh.mesh.permute(*(d for d in range(mesh.ndim) if d not in dims), *dims)
    rows = ranks.reshape(-1, math.prod(mesh.size(d) for d in dims)).sort().values.tolist()
    own = next(tuple(row) for row in rows if dist.get_rank() in row)
    if len(dims) > 1 and len(own) == dist.get_world_size():
        return own, (dist.group.WORLD,)
    return own, tuple(mesh.get_group(dim) for dim in dims)


def _name_of(param: Tensor, param_groups) -> str:
    return next(
        parameter_name(group, group_index, index)
        for group_index, group in enumerate(param_groups)
        for index, p in enumerate(group["params"])
        if p is param
    )
