"""Checks of what LARS is given: options, parameters and loaded state."""

import numbers

import torch
from torch import Tensor

from .op_call import HALF, HYPERPARAMETERS

_FUSED_DTYPES = (torch.float32, torch.float64, *HALF)


def check_group(group) -> None:
    """Checks a group's options, defaults filled in."""
    lr = group["lr"]
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"Tensor lr must be 1-element; it has shape {tuple(lr.shape)}")
        # The value of a tensor on an accelerator is not read: that would wait for the device.
        lr = lr.item() if lr.device.type == "cpu" else 0.0
    for name in HYPERPARAMETERS[:6]:
        if not isinstance(group[name] if name != "lr" else lr, numbers.Real):
            raise ValueError(f"{name} is {group[name]!r}; allowed: a number")
    torch.ops.fused_lars.check_hyperparameters.default(
        lr, *(group[name] for name in HYPERPARAMETERS[1:7]), group["classic_momentum"]
    )
    if group["fused"] and group["foreach"]:
        raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
    if group["fused"] and group["differentiable"]:
        raise RuntimeError("`fused` does not support `differentiable`")


def check_params(params, fused) -> None:
    for index, param in enumerate(params):
        if isinstance(param, tuple):
            index, param = param
        if not isinstance(param, Tensor):
            continue  # the base class has the error
        if param.layout != torch.strided:
            raise ValueError(f"parameter {index} has layout {param.layout}; allowed: torch.strided")
        if not fused:
            continue
        if param.dtype not in _FUSED_DTYPES:
            raise RuntimeError(
                f"`fused=True`: parameter {index} has dtype {param.dtype}; "
                f"allowed: {', '.join(map(str, _FUSED_DTYPES))}"
            )
        key = {"cpu": "CPU", "cuda": "CUDA"}.get(param.device.type)
        if key is None or not torch._C._dispatch_has_kernel_for_dispatch_key("fused_lars::step_", key):
            raise RuntimeError(
                f"`fused=True`: parameter {index} is on {param.device}, for which this build has no fused "
                "kernel; fused_lars.show_config() says what was built"
            )


def check_state(saved_id, key: str, value, param: Tensor) -> None:
    """Checks a value in the state of a state_dict."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{key} of parameter {saved_id} in the state_dict is {value!r}; expected a Tensor")
    shape = () if key == "step" else param.shape
    if value.shape != shape:
        of_what = "no dimensions" if key == "step" else f"the shape of the parameter, {tuple(shape)}"
        got = f"{key} of parameter {saved_id} in the state_dict has shape {tuple(value.shape)}"
        raise ValueError(f"{got}; expected {of_what}")
