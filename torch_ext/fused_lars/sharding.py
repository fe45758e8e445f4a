"""DTensor parameters: a rank steps its shards, with norms of the whole that one small all-reduce gives.

What a rank sends follows from what all ranks of a mesh know alike (the parameters, their meshes and
placements) and never from what it happens to hold, so that no empty shard or missing gradient makes a rank
wait for ever. That they do know it alike is seen to by peers.py.
"""

import math
from collections import defaultdict
from dataclasses import dataclass, field
from itertools import groupby

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from .op_call import HALF, OpCall, OpCalls, Workspace, Workspaces, on_device, parameter_name, way_to_compute
from .peers import Exchange, Peers, raise_first

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
        param = next(iter(self.parts.values()))[0]
        return (param._local_tensor if self.is_dtensor else param).device != self.device


class Sharding:
    """Gathers the op calls of an optimizer that has DTensor parameters."""

    def __init__(self) -> None:
        self._param_ids: list[int] = []
        self._dtensors: list[DTensor] = []
        self._rank_sets: list[_RankSet] = []  # in the order of their messages, by device
        self._peers: list[Peers] = []
        self._world: dist.ProcessGroup | None = None
        self._checked: list = []
        self._exchange = Exchange()
        self._workspaces = Workspaces()

    @torch._disable_dynamo
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
        calls, norms, error = OpCalls(), {}, None
        try:
            _set_options(self._rank_sets, optimizer.param_groups, given)
            self._gather(optimizer, found_inf, calls, norms)
        except Exception as caught:
            error = caught
        if error is None:
            messages = [message for of_device in norms.values() for message in of_device.messages()]
            self._exchange.add_up(messages)
        else:
            self._exchange.raise_everywhere(error, self._peers)
        for of_device in norms.values():
            of_device.hand_out()
        return calls

    def bump_versions(self) -> None:
        """Counts a change of every DTensor, for autograd, as an operator on the DTensor itself would."""
        torch.autograd.graph.increment_version([p for p in self._dtensors if p.grad is not None])

    def _gather(self, optimizer, found_inf, calls: OpCalls, norms: dict) -> None:
        replaced = _replaced_grads(self._dtensors, optimizer.param_groups)
        for rank_set in self._rank_sets:
            device = rank_set.device
            if device not in norms:
                grad_scale = on_device(getattr(optimizer, "grad_scale", None), device)
                norms[device] = _Norms(on_device(found_inf, device), grad_scale)
            for group_index, params in rank_set.parts.items():
                group = optimizer.param_groups[group_index]
                if group["differentiable"] and rank_set.peers is not None:
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
                call = calls[(device, *way_to_compute(group, group_index, device))]
                call.add_lists(lists, local)
                call.end_group(group, group_index)
                norms[device].add(call, group, params, local, rank_set, optimizer.state)
            norms[device].end(rank_set)
        if not self._peers:
            return
        # What the step alone would refuse, state, is found before the other ranks are told that this one
        # steps, where it is not that of the last time. The norms op sees everything else.
        state = []
        for call in calls.values():
            for tensors in call.local[2:]:
                state += map(id, tensors)
        if state != self._checked:
            self._check(optimizer, calls)
            self._checked = state
        for device, of_device in norms.items():
            try:
                of_device.take(self._workspaces[device])
            except (RuntimeError, TypeError, ValueError):
                self._check(optimizer, calls)  # which knows the parameter's name
                raise

    def _check(self, optimizer, calls: OpCalls) -> None:
        for call in calls.values():
            if call.params:
                optimizer._run(call, None, None, None, None, check_only=True)

    def _update(self, param_groups, given: dict[str, bool]) -> None:
        """Sorts the parameters by the ranks that share them, where they are not those of the step before."""
        ids = [id(p) for group in param_groups for p in group["params"]]
        if ids == self._param_ids and not any(rank_set.has_moved() for rank_set in self._rank_sets):
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
        self._rank_sets, self._peers, self._param_ids, self._checked = rank_sets, all_peers, ids, []
        self._world = dist.group.WORLD
        params = (p for group in param_groups for p in group["params"])
        self._dtensors = [p for p in params if isinstance(p, DTensor) and p.device_mesh.get_coordinate()]


class _Norms:
    """The rows of one norms op, those of a set of ranks together, which make its message."""

    def __init__(self, found_inf: Tensor | None, grad_scale: Tensor | None) -> None:
        self._found_inf = found_inf
        self._grad_scale = grad_scale
        self._group_sizes: list[int] = []
        self._options: list[tuple[float, bool, bool]] = []  # of each group, what norms depend on
        self._weights: list[Tensor] = []
        self._grads: list[Tensor] = []
        self._without_grad: dict[int, float] = {}  # rows, and what |w|^2 counts there as a gradient
        self._begin = 0
        self._spans: list[tuple[int, int, Peers]] = []
        self._runs: defaultdict[OpCall, list[list[int]]] = defaultdict(list)

    def add(self, call: OpCall, group, params: list[Tensor], local, rank_set: _RankSet, state) -> None:
        """Adds a row for each of `params` that has a gradient, and for the others too where they are shared.

        `local` has the local lists of those that have a gradient.
        """
        weights, grads, _, masters, _ = local
        if masters:
            masters = iter(masters)
            weights = [next(masters) if w.dtype in HALF else w for w in weights]
        decay = group["weight_decay"] if group["decayed_norm"] else 0.0
        first = len(self._weights)
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
            elif rank_set.peers is not None:
                # Ranks that have a gradient need this shard's part of the weight's norm.
                self._weights += (_weight_without_grad(p, state) for p in members)
                self._grads += self._weights[begin:]
                self._without_grad.update(dict.fromkeys(range(begin, len(self._weights)), decay * decay))
        self._end_group(len(self._weights) - first, (decay, group["maximize"], group["decayed_norm"]))

    def _end_group(self, size: int, options: tuple[float, bool, bool]) -> None:
        self._group_sizes.append(size)
        self._options.append(options)

    def end(self, rank_set: _RankSet) -> None:
        if rank_set.peers is not None:
            # The last row. The sum of the ranks' found_inf squared is not 0 where one of them is not.
            last = self._weights[0].new_empty(0) if self._found_inf is None else self._found_inf
            self._weights.append(last)
            self._grads.append(last)
            self._end_group(1, (0.0, False, False))
            self._spans.append((self._begin, len(self._weights), rank_set.peers))
        self._begin = len(self._weights)

    def take(self, workspace: Workspace) -> None:
        if not self._spans:
            return  # nothing is shared: the step takes its norms itself
        weight_decay, maximize, decayed_norm = map(list, zip(*self._options))
        self._norms = torch.ops.fused_lars.squared_norms.groups(
            self._weights,
            self._grads,
            self._group_sizes,
            weight_decay=weight_decay,
            maximize=maximize,
            decayed_norm=decayed_norm,
            grad_scale=self._grad_scale,
            workspace=workspace.tensor,
        )
        workspace.after_use()
        if self._without_grad:
            rows = torch.tensor([*self._without_grad], device="cpu")
            rows = rows.to(self._norms.device, non_blocking=True)
            factors = torch.tensor([*self._without_grad.values()], dtype=self._norms.dtype, device="cpu")
            factors = factors.to(self._norms.device, non_blocking=True)
            self._norms[rows, 1] = torch.where(factors > 0.0, self._norms[rows, 0] * factors, 0.0)

    def messages(self) -> list[tuple[Peers, Tensor]]:
        result = [(peers, self._norms[begin:end]) for begin, end, peers in self._spans]
        for peers, message in result:
            row = peers.last_row()
            if row or self._found_inf is not None:
                message[-1, 1] = row
        return result

    def hand_out(self) -> None:
        """Hands each call its squared norms, and what tells it to change nothing."""
        if not self._spans:
            return
        norms, found_inf = self._norms, None
        last = [end - 1 for _, end, _ in self._spans]
        if self._found_inf is None and norms.device.type == "cpu":
            pass  # the host has looked
        elif self._found_inf is None and len(last) == 1:
            # The upper half of an fp64 is an fp32 that is 0 only where a whole number is 0: no operator runs.
            found_inf = norms.view(torch.float32)[last[0], 3]
        else:
            found_inf = torch.linalg.vector_norm(torch.stack([norms[i] for i in last])).to(torch.float32)
        for call, runs in self._runs.items():
            rows = [norms[begin:end] for begin, end in runs]
            if rows:
                call.squared_norms = rows[0] if len(rows) == 1 else torch.cat(rows)
                call.found_inf = found_inf


def _set_options(rank_sets: list[_RankSet], param_groups, given: dict[str, bool]) -> None:
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
            device, is_dtensor, ranks = p.device, False, ()
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
    for key, arguments in reached.items():
        sizes = [*map(len, rank_sets[key].parts.values())]
        rank_sets[key].peers = Peers(key[1], *arguments, lines[key], sizes)
    return [rank_sets[key] for key in sorted(rank_sets)]


def _weight_without_grad(param: DTensor, state) -> Tensor:
    weight = state.get(param, {}).get("master_param", param)._local_tensor
    return weight if param.requires_grad else weight.new_empty(0)


def _replaced_grads(params: list[DTensor], param_groups) -> dict[DTensor, Tensor]:
    """Local gradients of the parameters whose gradients are placed otherwise than they are themselves.

    Sequence parallelism, for one, leaves the gradients of replicated parameters Partial. Those that wait for
    the same reduction share it. The gradients themselves are left as they are.
    """
    placed_otherwise = []
    for p in params:
        grad = p.grad
        if grad is None:
            continue
        spec = p._spec
        got = getattr(grad, "_spec", None)
        # fully_shard gives gradients the very spec of the parameter.
        if got is spec or (got and got.mesh is spec.mesh and got.placements == spec.placements):
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
        grads = [p.grad._local_tensor for p in members]
        # The local elements of all, as one tensor that is Partial where they are.
        placements = [got if got.is_partial() else Replicate() for got, _ in pairs]
        flat = torch.cat([grad.reshape(-1) for grad in grads])
        flat = DTensor.from_local(flat, mesh, placements, run_check=False)
        flat = flat.redistribute(placements=[Replicate()] * mesh.ndim)._local_tensor
        pieces = flat.split([grad.numel() for grad in grads])
        result.update((p, piece.view(grad.shape)) for p, piece, grad in zip(members, pieces, grads))
    return result


def _ranks_and_groups(mesh, dims: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[dist.ProcessGroup, ...]]:
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
