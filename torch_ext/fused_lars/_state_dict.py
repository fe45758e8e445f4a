"""Checks a state_dict before it is loaded, and afterwards restores what the base class has changed."""

import math
import numbers

import torch
from torch import Tensor

from ._checks import HALF, RNG_STATE_SIZE, STATE, check_group
from ._momentum import decoded_momentum, first_element, momentum_dtype, store_momentum

# How a process computes a step and stores state. A checkpoint of another process does not change it.
_IMPLEMENTATION = (
    "foreach",
    "capturable",
    "differentiable",
    "fused",
    "momentum_dtype",
    "stochastic_rounding",
)


def implementations(param_groups) -> list[dict]:
    return [*map(implementation_of, param_groups)]


def implementation_of(group) -> dict:
    return {name: group[name] for name in _IMPLEMENTATION}


def make_portable(_, state_dict) -> None:
    """Makes a state_dict that other layouts, other shardings and torch's tools can take. Called as a hook.

    fp32 momentum takes the place of int8 codes and their scales. A dtype among the options becomes its name,
    because torch.distributed.checkpoint takes no torch.dtype.
    """
    for group in state_dict["param_groups"]:
        if isinstance(group["momentum_dtype"], torch.dtype):
            group["momentum_dtype"] = str(group["momentum_dtype"]).removeprefix("torch.")
    state = state_dict["state"]
    for saved_id, values in state.items():
        if "momentum_scale" in values:
            others = {key: value for key, value in values.items() if key != "momentum_scale"}
            state[saved_id] = {**others, "momentum_buffer": decoded_momentum(values)}


def restore(state_dict, implementations, param_groups, state) -> None:
    """Completes `state` and `param_groups`, which the base class has made from `state_dict`."""
    for group, implementation in zip(param_groups, implementations):
        group.update(implementation)
    groups = {p: group for group in param_groups for p in group["params"]}
    # The base class has cast state to the parameter's dtype.
    for saved_id, param in _saved_ids(state_dict, param_groups):
        for key, value in state_dict["state"].get(saved_id, {}).items():
            own = state[param]
            if key in STATE and value is None:
                del own[key]
            elif key == "step":
                own[key] = torch.as_tensor(value).to(param.device, torch.float32)
            elif key == "rng_state":
                own[key] = value.to(param.device, copy=True)
                own[key][-1] = first_element(param)  # the sharding may be another one
            elif key == "momentum_buffer":
                # Only a 16-bit parameter keeps an fp32 buffer that was not asked for.
                dtype = momentum_dtype(groups[param], param, value if param.dtype in HALF else None)
                store_momentum(own, value.to(param.device), param, dtype)
            elif isinstance(value, Tensor):
                exact = value.dtype == torch.float32 and param.dtype in HALF
                own[key] = value.to(param.device, value.dtype if exact else param.dtype)


def check_has_state(state_dict) -> None:
    """Checks that a state_dict comes from an optimizer."""
    if missing := {"state", "param_groups"} - set(state_dict):
        raise ValueError(f"this is not a state_dict: it has no {sorted(missing)}, only {sorted(state_dict)}")


def check_state_dict(state_dict, defaults, param_groups, implementations, state, check_sharding) -> None:
    """Checks a state_dict before it replaces `param_groups` and `state`, except for `implementations`.

    `check_sharding` is the function of _sharded.sharding, or None if there can be no DTensors.
    """
    check_has_state(state_dict)
    for index, group in enumerate(state_dict["param_groups"]):
        if "trust_coefficient" not in group:
            raise ValueError(
                f"this is not a state_dict of LARS: param_groups[{index}] has no 'trust_coefficient', "
                f"only {sorted(k for k in group if k != 'params')}"
            )
        own = implementations[index] if index < len(implementations) else implementation_of(defaults)
        check_group({**defaults, **group, **own}, index)
    saved, own = (
        [len(group["params"]) for group in groups] for groups in (state_dict["param_groups"], param_groups)
    )
    if saved != own:
        return  # the base class raises the error
    # A wrapper, such as a Lookahead, may load again what it has put beside our state.
    saved_keys = [key for key in STATE if key != "momentum_scale"]
    known = {*saved_keys, *(key for values in state.values() for key in values if key != "momentum_scale")}
    for saved_id, param in _saved_ids(state_dict, param_groups):
        values = state_dict["state"].get(saved_id, {})
        if unknown := [key for key in values if key not in known]:
            raise ValueError(
                f"parameter {saved_id} in the state_dict has the state {unknown}; allowed: {saved_keys}. "
                "fused_lars.convert_state_dict takes over the state of other optimizers"
            )
        for key, value in values.items():
            # None stands for state that is missing, as in older states of torch's SGD.
            if key in STATE and value is not None:
                _check_state(saved_id, key, value, param)
                if check_sharding and key not in ("step", "rng_state"):
                    check_sharding(saved_id, key, value, param)


def _saved_ids(state_dict, param_groups):
    """Pairs of a parameter's id in a state_dict and the parameter."""
    saved = [i for group in state_dict["param_groups"] for i in group["params"]]
    return zip(saved, (p for group in param_groups for p in group["params"]))


def _check_state(saved_id, key: str, value, param: Tensor) -> None:
    where = f"{key} of parameter {saved_id} in the state_dict"
    if key == "step" and isinstance(value, numbers.Real):
        if not 0 <= float(value) < math.inf:
            raise ValueError(f"{where} is {value!r}; allowed: finite and >= 0")
        return
    if not isinstance(value, Tensor):
        raise ValueError(f"{where} is {value!r}; expected a Tensor{' or a number' * (key == 'step')}")
    shapes = {"step": ((), "no dimensions"), "rng_state": ((RNG_STATE_SIZE,), f"({RNG_STATE_SIZE},)")}
    of_param = (param.shape, f"the shape of the parameter, {tuple(param.shape)}")
    shape, of_what = shapes.get(key, of_param)
    if value.shape != shape:
        raise ValueError(f"{where} has shape {tuple(value.shape)}; expected {of_what}")
    if key == "rng_state" and value.dtype != torch.int64:
        raise ValueError(f"{where} has dtype {value.dtype}; expected torch.int64")
    if key == "momentum_buffer" and not value.is_floating_point():
        raise ValueError(
            f"{where} has dtype {value.dtype}; expected a floating-point dtype, also for int8 momentum"
        )
