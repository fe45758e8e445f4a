"""Checks the options and the parameters that LARS is given."""

import numbers

import torch
from torch import Tensor

from . import _library  # noqa: F401  registers torch.ops.fused_lars
from ._torch_internals import argument_names, has_kernel, is_under_dispatch_mode

# The hyperparameters of a group, with the op's names and in the op's order: numbers first, then switches.
_CHECK = torch.ops.fused_lars.check_hyperparameters.default
NUMBERS, SWITCHES = argument_names(_CHECK, "FloatType"), argument_names(_CHECK, "BoolType")
HYPERPARAMETERS = (*NUMBERS, *SWITCHES)

# Options that a later version added, with the value for runs that were saved before.
ADDED_OPTIONS = {
    "decayed_norm": False,
    "stochastic_rounding": False,
    "momentum_dtype": None,
    "rounding_seed": 0,
}

# The keys of a parameter's state. A state_dict has no momentum_scale: it holds int8 momentum in fp32.
STATE = ("momentum_buffer", "master_param", "step", "momentum_scale", "rng_state")
RNG_STATE_SIZE = 3

# The momentum_dtype of 8-bit codes with scales.
INT8 = "int8"

# Parameters of these dtypes may have fp32 state.
HALF = (torch.float16, torch.bfloat16)

# Devices that this build has fused kernels for.
FUSED_DEVICES = tuple(
    device for device, key in (("cpu", "CPU"), ("cuda", "CUDA")) if has_kernel("fused_lars::step_", key)
)

_PLAIN = {float, int, bool, str, type(None), torch.dtype}

_MOMENTUM_DTYPES = (None, torch.float32, torch.bfloat16, torch.float16, INT8)
_MOST_SEED = 2**31 - 1

_FUSED_DTYPES = (torch.float32, torch.float64, *HALF)


def check_group(group, index: int | None = None) -> None:
    """Checks the options of a group that has all defaults filled in.

    Errors name `index`, the group's place in param_groups.
    """
    where = "" if index is None else f" in group {index}"
    lr = group["lr"]
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"Tensor lr must be 1-element; lr{where} has shape {tuple(lr.shape)}")
        if not lr.is_floating_point():
            raise ValueError(f"lr{where} has dtype {lr.dtype}; allowed: a floating-point dtype")
        lr = lr.item() if host_reads(lr) else 0.0
    values = {name: group[name] for name in HYPERPARAMETERS}
    values["lr"] = lr
    for name in NUMBERS:
        check_number(name, values[name], index)
    check_adaptation(values["layer_adaptation"], index)
    for name in SWITCHES:
        if name != "layer_adaptation" and not isinstance(values[name], bool):
            raise ValueError(f"{name}{where} is {values[name]!r}; allowed: True, False")
    check_hyperparameters({**values, "layer_adaptation": bool(values["layer_adaptation"])}, index)
    check_rounding(group, where)
    if group["fused"] and group["foreach"]:
        raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
    if group["fused"] and group["differentiable"]:
        raise RuntimeError("`fused` does not support `differentiable`")


def check_rounding(group, where: str) -> None:
    """Checks the options of rounding. `where` comes after the name of an option in an error."""
    dtype, seed = group["momentum_dtype"], group["rounding_seed"]
    if dtype not in _MOMENTUM_DTYPES:
        raise ValueError(
            f"momentum_dtype{where} is {dtype!r}; allowed: {', '.join(map(repr, _MOMENTUM_DTYPES))}"
        )
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= _MOST_SEED:
        raise ValueError(f"rounding_seed{where} is {seed!r}; allowed: an int from 0 to 2**31 - 1")
    rounds = group["stochastic_rounding"] or dtype not in (None, torch.float32)
    if group["differentiable"] and rounds:
        raise ValueError(
            f"differentiable{where} is True, and autograd cannot follow a rounding; allowed: without "
            "stochastic_rounding, and with momentum_dtype None or torch.float32"
        )


def are_plain(options) -> bool:
    """Whether all values are numbers, bools, strings, dtypes or None, which cannot change in place.

    Any other value is an lr tensor, or a mistake that the checks of a step refuse.
    """
    return _PLAIN.issuperset(map(type, options))


def are_hyperparameters(values) -> bool:
    """Whether the values of HYPERPARAMETERS have the usual types."""
    numbers, switches = values[: len(NUMBERS)], values[len(NUMBERS) :]
    return {float, int}.issuperset(map(type, numbers)) and {bool, str}.issuperset(map(type, switches))


def host_reads(lr: Tensor) -> bool:
    """Whether the host may read an lr's value: it is on the CPU, and no program is being traced."""
    is_traced = torch.compiler.is_compiling() or is_under_dispatch_mode()
    return lr.device.type == "cpu" and not is_traced


def check_number(name: str, value, group: int | None = None) -> None:
    """Checks that an option of a parameter group is a number."""
    if not isinstance(value, numbers.Real):
        raise ValueError(f"{name}{_in_group(group)} is {value!r}; allowed: a number")


def check_adaptation(value, group: int | None = None) -> None:
    if value not in (True, False, "decayed"):
        raise ValueError(f'layer_adaptation{_in_group(group)} is {value!r}; allowed: True, False, "decayed"')


def check_hyperparameters(values: dict, group: int | None = None) -> None:
    """Checks the ranges of a parameter group's hyperparameters, as a step does."""
    try:
        _CHECK(*(values[name] for name in HYPERPARAMETERS))
    except ValueError as error:
        raise ValueError(str(error).replace(":", f"{_in_group(group)}:", 1)) from None


def _in_group(group: int | None) -> str:
    return "" if group is None else f" in group {group}"


def check_momentum_dtype(param: Tensor, dtype, name: str) -> None:
    """Checks that the momentum of a parameter, named as in an error, can have a dtype.

    This is what momentum_dtypes of csrc/step.h allows.
    """
    if dtype in (None, torch.float32):
        return
    allowed: list = [param.dtype, torch.float32, INT8]
    if param.dtype == torch.float32:
        allowed = [torch.float32, torch.bfloat16, torch.float16, INT8]
    elif param.dtype not in HALF:
        allowed = [torch.float32]
    if dtype not in allowed:
        raise ValueError(
            f"momentum_dtype is {dtype!r} for {name} of {param.dtype}; allowed there: None, "
            f"{', '.join(map(repr, allowed))}"
        )


def check_params(params, fused, momentum_dtype=None) -> None:
    """Checks the parameters of a group, given alone or in pairs of a name and a parameter."""
    for index, param in enumerate(params):
        if isinstance(param, tuple):
            index, param = param
        if not isinstance(param, Tensor):
            continue  # the base class raises the error
        if param.layout != torch.strided:
            raise ValueError(f"parameter {index} has layout {param.layout}; allowed: torch.strided")
        check_momentum_dtype(param, momentum_dtype, f"parameter {index}")
        if not fused:
            continue
        if param.dtype not in _FUSED_DTYPES:
            raise RuntimeError(
                "`fused=True` requires all the params to be floating point Tensors of supported devices; "
                f"parameter {index} has dtype {param.dtype}; "
                f"allowed: {', '.join(map(str, _FUSED_DTYPES))}"
            )
        # A parameter on meta gets its memory before the first step, and that step checks again.
        if param.device.type not in (*FUSED_DEVICES, "meta"):
            raise RuntimeError(no_fused_kernels(f"parameter {index}", param.device))


def no_fused_kernels(name: str, device: torch.device) -> str:
    """The error for a parameter with fused=True. It begins like torch's own."""
    return (
        "`fused=True` requires all the params to be floating point Tensors of supported devices; "
        f"{name} is on {device}, for which this build has no fused kernel; fused_lars.show_config() says "
        "what was built"
    )
