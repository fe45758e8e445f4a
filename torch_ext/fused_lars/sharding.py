"""DTensor parameters: a rank steps its shards, with norms of the whole that one small all-reduce gives.

What a rank sends follows from what all ranks of a mesh know alike (the parameters, their meshes and
placements) and never from what it happens to hold, so that no empty shard or missing gradient makes a rank
wait for ever.
"""

import functools
import math
from collections import defaultdict
from dataclasses import dataclass, field
from itertools import groupby

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from .op_call import HALF, OpCall, OpCalls, Workspace, Workspaces, on_device, parameter_name, way_to_compute

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
    process_group: dist.ProcessGroup | None  # None: this rank has them whole
    staging: torch.device | None  # where the group reduces what is on a device that it has no back end for
    parts: dict[int, list[Tensor]] = field(default_factory=lambda: defaultdict(list))  # by parameter group


class Sharding:
    """Gathers the op calls of an optimizer that has DTensor parameters."""

    def __init__(self) -> None:
        self._param_ids: list[int] = []
        self._dtensors: list[DTensor] = []
        self._rank_sets: dict[torch.device, list[_RankSet]] = {}
        self._workspaces = Workspaces()

    @torch._disable_dynamo
    def calls(self, optimizer, found_inf: Tensor | None) -> OpCalls:
        """The calls of a step, by device and implementation: local tensors, with norms of whole tensors."""
        self._update(optimizer.param_groups)
        replaced = _replaced_grads(self._dtensors, optimizer.param_groups)
        calls = OpCalls()
        for device, rank_sets in self._rank_sets.items():
            norms = _Norms(on_device(found_inf, device))
            for rank_set in rank_sets:
                for group_index, params in rank_set.parts.items():
                    group = optimizer.param_groups[group_index]
                    if group["differentiable"] and rank_set.process_group is not None:
                        raise ValueError(
                            f"param_groups[{group_index}] has differentiable=True and sharded parameters, "
                            "whose norms autograd cannot follow from rank to rank; allowed: fused, foreach"
                        )
                    lists = ([], [], [], [], [])
                    optimizer._init_group({**group, "params": params}, *lists)
                    local = lists
                    if rank_set.is_dtensor:
                        local = (*([t._local_tensor for t in tensors] for tensors in lists[:4]), lists[4])
                        if replaced:
                            local[1][:] = [replaced.get(p, grad) for p, grad in zip(lists[0], local[1])]
                    call = calls[(device, *way_to_compute(group))]
                    call.add_lists(lists, local)
                    call.end_group(group, group_index)
                    norms.add(call, params, local, rank_set, optimizer.state)
                norms.end(rank_set)
            norms.reduce(self._workspaces[device])
        return calls

    def bump_versions(self) -> None:
        """Counts a change of every DTensor, for autograd, as an operator on the DTensor itself would."""
        torch.autograd.graph.increment_version([p for p in self._dtensors if p.grad is not None])

    def _update(self, param_groups) -> None:
        """Sorts the parameters by the ranks that share them, where they are not those of the step before."""
        ids = [id(p) for group in param_groups for p in group["params"]]
        if ids == self._param_ids:
            return
        self._dtensors = []
        rank_sets: dict[tuple, _RankSet] = {}
        for group_index, group in enumerate(param_groups):
            for p in group["params"]:
                device, is_dtensor, ranks, process_group, staging = p.device, False, (), None, None
                if isinstance(p, DTensor):
                    mesh = p.device_mesh
                    if mesh.get_coordinate() is None:
                        continue  # all of it is on other ranks
                    self._dtensors.append(p)
                    device, is_dtensor = p._local_tensor.device, True
                    dims = [
                        d for d, x in enumerate(p.placements) if mesh.size(d) > 1 and not x.is_replicate()
                    ]
                    if dims:
                        ranks, process_group = _ranks_and_group(mesh, tuple(dims), dist.group.WORLD)
                        # NCCL alone, with parameters that fully_shard has offloaded to the CPU.
                        if f"{device.type}:" not in dist.get_backend_config(process_group):
                            staging = torch.device(mesh.device_type)
                # The order of their messages, which is the same on all ranks.
                key = (device.type, ranks, is_dtensor, str(device))
                rank_set = _RankSet(device, is_dtensor, process_group, staging)
                rank_sets.setdefault(key, rank_set).parts[group_index].append(p)
        self._rank_sets = {}
        for key in sorted(rank_sets):
            self._rank_sets.setdefault(rank_sets[key].device, []).append(rank_sets[key])
        self._param_ids = ids


class _Norms:
    """The rows of one norms op, those of a set of ranks together, which make its message."""

    def __init__(self, found_inf: Tensor | None) -> None:
        self._found_inf = found_inf
        self._weights: list[Tensor] = []
        self._grads: list[Tensor] = []
        self._without_grad: list[int] = []
        self._begin = 0
        self._messages: list[tuple[int, int, _RankSet]] = []
        self._runs: defaultdict[OpCall, list[list[int]]] = defaultdict(list)

    def add(self, call: OpCall, params: list[Tensor], local, rank_set: _RankSet, state) -> None:
        """Adds a row for each of `params` that has a gradient, and for the others too where they are shared.

        `local` has the local lists of those that have a gradient.
        """
        weights, grads, _, masters, _ = local
        if masters:
            masters = iter(masters)
            weights = [next(masters) if w.dtype in HALF else w for w in weights]
        runs = self._runs[call]
        done = 0
        # Most often all have one, and need not be asked again.
        stretches = [(True, params)]
        if len(weights) < len(params):
            stretches = groupby(params, lambda p: p.grad is not None)
        for has_grad, members in stretches:
            members = list(members)
            begin = len(self._weights)
            if has_grad:
                self._weights += weights[done : done + len(members)]
                self._grads += grads[done : done + len(members)]
                done += len(members)
                if runs and runs[-1][1] == begin:
                    runs[-1][1] = len(self._weights)
                else:
                    runs.append([begin, len(self._weights)])
            elif rank_set.process_group is not None:
                # Ranks that have a gradient need this shard's part of the weight's norm.
                self._weights += (_weight_without_grad(p, state) for p in members)
                self._grads += self._weights[begin:]
                self._without_grad += range(begin, len(self._weights))

    def end(self, rank_set: _RankSet) -> None:
        if rank_set.process_group is not None:
            if self._found_inf is not None:
                # As one more tensor: the sum of the ranks' squares is not 0 where one of them is not.
                self._weights.append(self._found_inf)
                self._grads.append(self._found_inf)
            self._messages.append((self._begin, len(self._weights), rank_set))
        self._begin = len(self._weights)

    def reduce(self, workspace: Workspace) -> None:
        """Hands each call its squared norms, and the found_inf on which the ranks agree."""
        if not self._messages:
            return  # nothing is shared: the step takes its norms itself
        norms = torch.ops.fused_lars.squared_norms(self._weights, self._grads, workspace=workspace.tensor)
        workspace.after_use()
        if self._without_grad:
            rows = torch.tensor(self._without_grad, device="cpu").to(norms.device, non_blocking=True)
            norms[:, 1].index_fill_(0, rows, 0.0)
        works = []
        for begin, end, rank_set in self._messages:
            message = norms[begin:end]
            sent = message if rank_set.staging is None else message.to(rank_set.staging)
            work = dist.all_reduce(sent, group=rank_set.process_group, async_op=True)
            works.append((work, message, sent))
        for work, message, sent in works:
            work.wait()
            if sent is not message:
                message.copy_(sent)
        found_inf = self._found_inf
        if found_inf is not None:
            found_inf = sum(norms[end - 1, 0] for _, end, _ in self._messages).to(found_inf.dtype)
        for call, runs in self._runs.items():
            rows = [norms[begin:end] for begin, end in runs]
            if rows:
                call.squared_norms = rows[0] if len(rows) == 1 else torch.cat(rows)
                call.found_inf = found_inf


def _weight_without_grad(param: DTensor, state) -> Tensor:
    weight = state.get(param, {}).get("master_param", param)._local_tensor
    return weight if param.requires_grad else weight.new_empty(0)


def _replaced_grads(params: list[DTensor], param_groups) -> dict[DTensor, Tensor]:
    """Local gradients of the parameters whose gradients are placed otherwise than they are themselves.

    Sequence parallelism, for one, leaves the gradients of replicated parameters Partial. Those that wait for
    the same reduction share it. The gradients themselves are left as they are.
    """
    result: dict[DTensor, Tensor] = {}
    partial: defaultdict[tuple, list[DTensor]] = defaultdict(list)
    for p in params:
        grad = p.grad
        if grad is None or (isinstance(grad, DTensor) and grad._spec is p._spec):
            continue
        if not isinstance(grad, DTensor) or grad.device_mesh != p.device_mesh:
            got = f"on {grad.device_mesh}" if isinstance(grad, DTensor) else "no DTensor"
            raise ValueError(
                f"the gradient of {_name_of(p, param_groups)} is {got}; expected a DTensor on {p.device_mesh}"
            )
        if grad.placements == p.placements:
            continue
        pairs = tuple(zip(grad.placements, p.placements))
        if all(got == wanted or (got.is_partial() and wanted.is_replicate()) for got, wanted in pairs):
            partial[p.device_mesh, pairs, grad.dtype].append(p)
        else:
            result[p] = grad.redistribute(placements=p.placements)._local_tensor
    for (mesh, pairs, _), members in partial.items():
        grads = [p.grad._local_tensor for p in members]
        # The local elements of all, as one tensor that is Partial where they are.
        placements = [got if got.is_partial() else Replicate() for got, _ in pairs]
        flat = torch.cat([grad.reshape(-1) for grad in grads])
        flat = DTensor.from_local(flat, mesh, placements, run_check=False)
        flat = flat.redistribute(placements=[Replicate()] * mesh.ndim)._local_tensor
        pieces = flat.split([grad.numel() for grad in grads])
        result.update((p, piece.view(grad.shape)) for p, piece, grad in zip(members, pieces, grads))
    return result


def _ranks_and_group(mesh, dims: tuple[int, ...], world) -> tuple[tuple[int, ...], dist.ProcessGroup]:
    """The ranks that differ from this one in `dims` of a mesh only, sorted, and their process group."""
    ranks = mesh.mesh.permute(*(d for d in range(mesh.ndim) if d not in dims), *dims)
    rows = ranks.reshape(-1, math.prod(mesh.size(d) for d in dims)).sort().values.tolist()
    own = next(tuple(row) for row in rows if dist.get_rank() in row)
    if len(dims) == 1:
        return own, mesh.get_group(dims[0])
    return own, world if len(own) == dist.get_world_size() else _new_group(tuple(map(tuple, rows)), world)


@functools.cache
def _new_group(rows: tuple[tuple[int, ...], ...], world) -> dist.ProcessGroup:
    """A process group of the one of `rows` that has this rank, for as long as the default group is `world`.

    All ranks of a mesh come here in one order, that of their parameters.
    """
    # Where communicators are split off the default group's, each split needs all its ranks.
    together = world.bound_device_id is not None
    rank = dist.get_rank()
    made = {
        row: dist.new_group(row, use_local_synchronization=not together)
        for row in rows
        if together or rank in row
    }
    return next(group for row, group in made.items() if rank in row)


def _name_of(param: Tensor, param_groups) -> str:
    return next(
        parameter_name(group, group_index, index)
        for group_index, group in enumerate(param_groups)
        for index, p in enumerate(group["params"])
        if p is param
    )
