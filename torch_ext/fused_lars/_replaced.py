"""Notices when a framework has replaced an optimizer's parameters by other tensors.

Accelerate replaces them by DTensors, DeepSpeed by one flat tensor for a group, Megatron-LM by flat pieces.
"""

from dataclasses import dataclass
from operator import is_

from torch import Tensor
from torch.nn.parameter import is_lazy

from ._names import parameter_name

# DeepSpeed's mark on parameters that ZeRO 3 partitions, and on the flat ones that it steps instead.
_ZERO_3 = "ds_id"

_NO_NORM = (
    "a piece of many layers has no norm of a layer; use DistributedDataParallel, ZeroRedundancyOptimizer or "
    "torch.distributed.fsdp.fully_shard (FSDP2)"
)


@dataclass
class _Seen:
    ids: set[int]
    all_flat: bool
    # Those of the last step. None before the first: Accelerate needs the constructor's to be freed by then.
    params: list[Tensor] | None = None

    def made_flat(self, params: list[Tensor]) -> bool:
        """Whether all are flat and new, and are no resized biases."""
        # A group of biases alone had nothing but flat parameters, and has as many after a resize.
        if self.all_flat and len(params) >= len(self.ids):
            return False
        return not any(id(p) in self.ids or _has_shape(p) or type(p).__name__ == "DTensor" for p in params)


class SeenParams:
    """The parameters of all groups as they were when they were last looked at."""

    def __init__(self) -> None:
        # By the id of the group's dict, because frameworks drop groups and take one at a time.
        self._groups: dict[int, _Seen] = {}

    def replaced(self, param_groups):
        """Yields the index of each group whose parameters differ from the step before, for look()."""
        for index, group in enumerate(param_groups):
            seen, params = self._groups.get(id(group)), group["params"]
            last = seen.params if seen is not None else None
            if last is None or len(last) != len(params) or not all(map(is_, params, last)):
                yield index
                self._groups[id(group)].params = [*params]

    def look(self, group, group_index: int) -> None:
        """Remembers what a group holds now.

        Raises:
            ValueError: flat tensors have replaced the parameters.
        """
        params = group["params"]
        for index, param in enumerate(params):
            if hasattr(param, _ZERO_3):
                name = parameter_name(group, group_index, index)
                raise ValueError(f"{name} is part of a flat one of DeepSpeed's ZeRO 3: {_NO_NORM}")
        seen = self._groups.get(id(group))
        if params and seen is not None and seen.made_flat(params):
            raise ValueError(
                f"param_groups[{group_index}]['params'] had {len(seen.ids)} parameters and now has "
                f"{len(params)} flat, of shape {tuple(params[0].shape)}, as DeepSpeed's ZeRO and "
                f"Megatron-LM's distributed optimizer put them there: {_NO_NORM}. Where they are "
                "parameters of your own, make another optimizer"
            )
        if params or seen is None:  # ZeRO 3 leaves a group empty between steps
            self._groups[id(group)] = _Seen({id(p) for p in params}, not any(map(_has_shape, params)))

    def of_same_groups(self, old_groups, new_groups) -> "SeenParams":
        """The same parameters, for the new group dicts that load_state_dict has made."""
        result = SeenParams()
        for old, new in zip(old_groups, new_groups):
            if id(old) in self._groups:
                result._groups[id(new)] = self._groups[id(old)]
        return result


def _has_shape(param: Tensor) -> bool:
    return is_lazy(param) or param.dim() != 1
