"""The state of momentum and of stochastic rounding: which a parameter needs, how it is made and converted."""

import torch
from torch import Tensor

from ._checks import HALF, INT8, check_momentum_dtype, check_rounding
from ._names import parameter_name
from ._torch_internals import is_dtensor_like, local_of

_SCALE_BLOCK = 128  # elements of an int8 buffer that share a scale, see csrc/rounding.h


def momentum_dtype(group, param: Tensor, buffer: Tensor | None) -> torch.dtype:
    """The dtype that a parameter's buffer has to have. int8 stands for codes with scales.

    `buffer` is the one that there is. Without an option, an fp32 buffer of a 16-bit parameter stays fp32.
    """
    wanted = group["momentum_dtype"]
    if wanted is not None:
        return torch.int8 if wanted == INT8 else wanted
    own = torch.float32 if group["master_weights"] and param.dtype in HALF else param.dtype
    return torch.float32 if buffer is not None and buffer.dtype == torch.float32 else own


def check_options(group, param_groups) -> None:
    """Checks the options of a group, which may be new ones, before a step changes state for them."""
    dtype = group["momentum_dtype"]
    try:
        check_rounding(group, "")
        for p in group["params"]:
            check_momentum_dtype(p, dtype, "")
    except ValueError:
        # Only an error needs the places, and a part of a group (_sharded/gathered.py) does not know them.
        members = {*map(id, group["params"])}
        for group_index, own in enumerate(param_groups):
            for index, p in enumerate(own["params"]):
                if id(p) in members:
                    check_rounding(group, f" in group {group_index}")
                    check_momentum_dtype(p, dtype, parameter_name(own, group_index, index))
        raise


def new_buffer(values, param: Tensor, dtype: torch.dtype) -> None:
    """Puts zeros for momentum into a parameter's state. They are valid even if AMP skips the first step."""
    values["momentum_buffer"] = torch.zeros_like(
        param, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False
    )
    if dtype == torch.int8:
        blocks = -(-local_of(param).numel() // _SCALE_BLOCK)
        values["momentum_scale"] = torch.zeros(blocks, dtype=torch.float32, device=param.device)


def store_momentum(values, momentum: Tensor, param: Tensor, dtype: torch.dtype) -> None:
    """Puts momentum of a floating-point dtype into a parameter's state, converted to `dtype`."""
    values.pop("momentum_scale", None)
    if dtype != torch.int8:
        values["momentum_buffer"] = momentum.to(dtype)
        return
    # The blocks of codes are runs of memory, so they take the parameter's layout.
    like = torch.empty_like(local_of(param), dtype=torch.float32, memory_format=torch.preserve_format)
    codes, scale = torch.ops.fused_lars.encode_momentum(like.copy_(local_of(momentum)))
    values["momentum_buffer"], values["momentum_scale"] = _like_parameter(codes, param), scale


def decoded_momentum(values) -> Tensor:
    """Returns the momentum in a parameter's state, in fp32 if it is kept in int8."""
    buffer = values["momentum_buffer"]
    if buffer.dtype != torch.int8:
        return buffer
    momentum = torch.ops.fused_lars.decode_momentum(local_of(buffer), values["momentum_scale"])
    return _like_parameter(momentum, buffer)


def needs_rng_state(group, param: Tensor, buffer: Tensor | None) -> bool:
    """Whether a step rounds stochastically, under the conditions of csrc/step.h."""
    is_half = param.dtype in HALF and not group["master_weights"]
    if buffer is not None and (buffer.dtype == torch.int8 or (buffer.dtype in HALF and not is_half)):
        return True
    return is_half and group["stochastic_rounding"]


def new_rng_state(param: Tensor, group, position: int) -> Tensor:
    """Makes the rng_state of the parameter at a position in the optimizer: key, updates, first element."""
    key = group["rounding_seed"] << 32 | position
    return torch.tensor([key, 0, first_element(param)], device=param.device)


def first_element(param: Tensor) -> int:
    """The index that a parameter's first element has for stochastic rounding."""
    if not is_dtensor_like(param):
        return 0
    from ._sharded.placements import first_element_of_shard

    return first_element_of_shard(param)


def _like_parameter(local: Tensor, param: Tensor) -> Tensor:
    if not is_dtensor_like(param):
        return local
    from ._sharded.placements import sharded_like

    return sharded_like(local, param)
