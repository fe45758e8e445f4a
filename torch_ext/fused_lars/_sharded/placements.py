"""Handles gradients whose placements differ from those of their parameters."""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from .._names import parameter_name
from .._torch_internals import first_row, get_local, get_spec


def is_placed_as(got, spec) -> bool:
    """Whether two specs have the same mesh and placements."""
    return got is spec or (got.mesh is spec.mesh and got.placements == spec.placements)


def first_element_of_shard(param) -> int:
    """The index that the first element of a DTensor's shard has for stochastic rounding.

    In a shard of rows it is the index in the whole tensor. So the whole tensor gets the same random bits from
    any number of ranks. A shard of another kind is not a run of elements of the whole, and gets a range of
    indices that no other shard has. Ranks with the same shard have the same index.
    """
    mesh, numel = param.device_mesh, param.numel()
    coordinate = mesh.get_coordinate()
    sharded = [i for i, placement in enumerate(param.placements) if not placement.is_replicate()]
    if coordinate is None or not sharded:
        return 0
    if all(param.placements[i] == Shard(0) for i in sharded):
        return first_row(param) * (numel // param.shape[0] if param.shape[0] else 0)
    number = 1
    for i in sharded:
        number = number * mesh.size(i) + coordinate[i]
    return number * numel


def sharded_like(local: Tensor, param) -> DTensor:
    """Makes a DTensor of local tensors that is sharded as another DTensor is."""
    return DTensor.from_local(
        local,
        param.device_mesh,
        param.placements,
        run_check=False,
        shape=param.shape,
        stride=param.stride(),
    )


def replaced_grads(params: list[DTensor], param_groups) -> dict[DTensor, Tensor]:
    """Returns local gradients for the parameters whose gradients have other placements than they have.

    Sequence parallelism, for example, leaves the gradients of replicated parameters Partial. Gradients that
    need the same reduction share it. The gradients themselves are not changed.
    """
    placed_otherwise = []
    for p in params:
        grad: Any = p.grad
        if grad is None:
            continue
        spec = get_spec(p)
        got = get_spec(grad) if isinstance(grad, DTensor) else None
        if got is not None and is_placed_as(got, spec):
            continue
        if got is None or got.mesh != spec.mesh:
            got = f"on {grad.device_mesh}" if isinstance(grad, DTensor) else "no DTensor"
            raise ValueError(
                f"the gradient of {_name_of(p, param_groups)} is {got}; expected a DTensor on {p.device_mesh}"
            )
        if got.placements != spec.placements:
            placed_otherwise.append(p)
    # Nothing is sent before all is checked, so that this rank takes part in every reduction or in none.
    result: dict[DTensor, Tensor] = {}
    partial: defaultdict[tuple, list[DTensor]] = defaultdict(list)
    for p in placed_otherwise:
        grad = p.grad
        pairs = tuple(zip(grad.placements, p.placements))
        if all(got == wanted or (got.is_partial() and wanted.is_replicate()) for got, wanted in pairs):
            partial[p.device_mesh, pairs, grad.dtype].append(p)
        else:
            result[p] = get_local(grad.redistribute(placements=p.placements))
    for (mesh, pairs, _), members in partial.items():
        grads = [get_local(p.grad) for p in members]
        # All local elements in one tensor, which is Partial in the mesh dimensions where they are.
        placements = [got if got.is_partial() else Replicate() for got, _ in pairs]
        flat = torch.cat([grad.reshape(-1) for grad in grads])
        flat = DTensor.from_local(flat, mesh, placements, run_check=False)
        flat = get_local(flat.redistribute(placements=[Replicate()] * mesh.ndim))
        pieces = flat.split([grad.numel() for grad in grads])
        result.update((p, piece.view(grad.shape)) for p, piece, grad in zip(members, pieces, grads))
    return result


def _name_of(param: Tensor, param_groups) -> str:
    return next(
        parameter_name(group, group_index, index)
        for group_index, group in enumerate(param_groups)
        for index, p in enumerate(group["params"])
        if p is param
    )
