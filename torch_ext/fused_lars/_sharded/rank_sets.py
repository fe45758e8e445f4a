"""Sets of ranks that share parameters, and the parameters that each set shares."""

import math
from collections import defaultdict
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from .._torch_internals import get_local, local_of
from .peers import Peers


@dataclass
class RankSet:
    """Parameters on one device whose shards are on the same ranks."""

    device: torch.device
    is_dtensor: bool
    peers: Peers | None = None  # None: this rank has them whole
    parts: dict[int, list[Tensor]] = field(default_factory=lambda: defaultdict(list))  # by parameter group

    def has_moved(self) -> bool:
        return local_of(next(iter(self.parts.values()))[0]).device != self.device


def sorted_by_ranks(param_groups) -> list[RankSet]:
    """Sorts the parameters of all groups by the ranks that share them, in the order of their messages."""
    rank_sets: dict[tuple, RankSet] = {}
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
                device, is_dtensor = get_local(p).device, True
                dims = [d for d, x in enumerate(p.placements) if mesh.size(d) > 1 and not x.is_replicate()]
                if dims and device.type != "meta":  # meta tensors have no values to add up
                    ranks, groups = ranks_and_groups(mesh, tuple(dims))
            # Sorting by this key gives the order of the messages, which is the same on all ranks.
            key = (device.type, ranks, is_dtensor, str(device))
            rank_sets.setdefault(key, RankSet(device, is_dtensor)).parts[group_index].append(p)
            if ranks:
                # False for NCCL alone, with parameters that fully_shard has offloaded to the CPU.
                has_backend = f"{device.type}:" in dist.get_backend_config(groups[0])
                reached[key] = groups, device, None if has_backend else torch.device(mesh.device_type)
                name = f"{group['param_names'][index]!r}, " if "param_names" in group else ""
                lines[key].append(f"{name}{p.dtype} {tuple(p.shape)} {p.placements}")
    for key, (groups, device, staging) in reached.items():
        sizes = [*map(len, rank_sets[key].parts.values())]
        rank_sets[key].peers = Peers(key[1], groups, device, staging, lines[key], sizes)
    return [rank_sets[key] for key in sorted(rank_sets)]


def ranks_and_groups(mesh, dims: tuple[int, ...]) -> tuple[tuple[int, ...], tuple]:
    """Returns the ranks that differ from this one only in `dims` of a mesh, and groups to sum over.

    The ranks are sorted. No process group is made, because all ranks of the job would have to make it
    together. Those of other pipeline stages are not here.
    """
    ranks = mesh.mesh.permute(*(d for d in range(mesh.ndim) if d not in dims), *dims)
    rows = ranks.reshape(-1, math.prod(mesh.size(d) for d in dims)).sort().values.tolist()
    own = next(tuple(row) for row in rows if dist.get_rank() in row)
    if len(dims) > 1 and len(own) == dist.get_world_size():
        return own, (dist.group.WORLD,)
    return own, tuple(mesh.get_group(dim) for dim in dims)
