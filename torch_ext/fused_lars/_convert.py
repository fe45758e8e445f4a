"""Converts a checkpoint of another optimizer to one of LARS."""

from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ._checks import HALF
from ._names import place_of
from ._optimizer import LARS
from ._state_dict import check_has_state

__all__ = ["convert_state_dict"]


class _Source(NamedTuple):
    """How another optimizer keeps its momentum."""

    key: str
    sign: float  # of the buffer, relative to ours
    classic_momentum: bool  # the learning rate is part of the buffer


_SOURCES = {
    "sgd": _Source("momentum_buffer", 1.0, classic_momentum=False),
    "mu": _Source("mu", 1.0, classic_momentum=False),
    "apex": _Source("momentum_buffer", -1.0, classic_momentum=True),
}


def convert_state_dict(
    state_dict: dict[str, Any],
    optimizer: LARS,
    source: Literal["sgd", "mu", "apex"],
    params: Iterable[Tensor] | Iterable[tuple[str, Tensor]] | None = None,
) -> dict[str, Any]:
    """Makes a state_dict of :class:`fused_lars.LARS` from one of another optimizer.

    Only momentum is converted. Hyperparameters stay those of ``optimizer``. If just one of the two optimizers
    has the learning rate in its buffer (``classic_momentum``), the buffers are multiplied or divided by the
    learning rate in the state_dict's group. At a constant learning rate the run then goes on as before. Under
    a schedule, all earlier updates count as if they had been made at that learning rate.

    Args:
        state_dict (dict): the other optimizer's ``state_dict()``.
        optimizer (LARS): the optimizer that is to load the result. It is not changed.
        source (str): "sgd" for ``torch.optim.SGD`` and optimizers that keep momentum like it: timm, lightly,
            lightning-bolts, solo-learn, pytorch_optimizer, and the optimizer that torchlars or apex's LARC
            wraps (SwAV, VISSL). "mu" for the LARS of Barlow Twins, VICReg, DINO, MoCo v3 and MAE. "apex" for
            apex's FusedLARS, whose buffers have the opposite sign.
        params (iterable, optional): the parameters, or pairs of a name and a parameter, in the order in which
            the other optimizer got them, such as ``model.parameters()``. Default: the order of ``optimizer``.

    Returns:
        A dict for :meth:`fused_lars.LARS.load_state_dict`.

    Raises:
        ValueError: the source is unknown, the parameters are not the optimizer's, state has other names or
            shapes, or a learning rate to divide by is 0.

    Example:
        >>> optimizer = fused_lars.LARS(fused_lars.param_groups(model, 1e-6), lr=0.2, momentum=0.9,
        ...                             classic_momentum=False, decayed_norm=True)
        >>> state = fused_lars.convert_state_dict(theirs, optimizer, "mu", model.parameters())
        >>> optimizer.load_state_dict(state)
    """
    if not isinstance(source, str) or source not in _SOURCES:
        raise ValueError(f"source is {source!r}; allowed: {', '.join(map(repr, _SOURCES))}")
    key, sign, is_classic = _SOURCES[source]
    if not isinstance(optimizer, LARS):
        raise ValueError(
            f"optimizer is {type(optimizer).__name__}; expected fused_lars.LARS, which loads the result"
        )
    check_has_state(state_dict)
    if any("classic_momentum" in group for group in state_dict["param_groups"]):
        raise ValueError("this is a state_dict of LARS already; expected another optimizer's")
    own = {
        id(p): (group, group_index, index)
        for group_index, group in enumerate(optimizer.param_groups)
        for index, p in enumerate(group["params"])
    }
    if params is None:
        params = [p for group in optimizer.param_groups for p in group["params"]]
    ordered = [p[1] if isinstance(p, tuple) else p for p in params]  # pairs come from named_parameters()
    for number, param in enumerate(ordered):
        if not isinstance(param, Tensor):
            raise ValueError(f"params[{number}] is {type(param).__name__}; expected a parameter")
    saved = [(saved_id, group) for group in state_dict["param_groups"] for saved_id in group["params"]]
    if len(saved) != len(ordered):
        raise ValueError(f"the state_dict has {len(saved)} parameters; expected {len(ordered)}")

    result = optimizer.state_dict()
    state = {}
    for number, ((saved_id, saved_group), param) in enumerate(zip(saved, ordered)):
        if id(param) not in own:
            raise ValueError(f"params[{number}], of shape {tuple(param.shape)}, is not the optimizer's")
        group, group_index, index = own[id(param)]
        values = state_dict["state"].get(saved_id, {})
        if others := sorted(name for name in values if name != key):
            raise ValueError(f"parameter {saved_id} has the state {others}; expected of {source!r}: {key!r}")
        buffer = values.get(key)
        if buffer is None:
            continue
        place = place_of(group_index, index)
        if not isinstance(buffer, Tensor):
            raise ValueError(f"{key} of parameter {saved_id} is {type(buffer).__name__}; expected a Tensor")
        if buffer.shape != param.shape:
            raise ValueError(
                f"{key} of parameter {saved_id} has shape {tuple(buffer.shape)}; expected that of {place}, "
                f"{tuple(param.shape)}: pass params in the order of the state_dict"
            )
        factor = sign
        if is_classic != group["classic_momentum"]:
            lr = float(saved_group["lr"])
            if is_classic and lr == 0.0:
                raise ValueError(
                    f"lr of parameter {saved_id} is 0 in the state_dict; expected > 0, since its buffer "
                    f"holds the learning rate and that of {place} does not"
                )
            factor = factor / lr if is_classic else factor * lr
        if buffer.dtype in HALF:
            buffer = buffer.to(torch.float32)  # LARS keeps an fp32 buffer in fp32
        state[result["param_groups"][group_index]["params"][index]] = {"momentum_buffer": factor * buffer}
    return {**result, "state": state}
