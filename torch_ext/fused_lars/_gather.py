"""Gathers the tensors for a step's op calls, and creates missing state."""

import torch

from ._checks import HALF
from ._momentum import (
    check_options,
    decoded_momentum,
    momentum_dtype,
    needs_rng_state,
    new_buffer,
    new_rng_state,
    store_momentum,
)
from ._op_call import OpCalls, TensorLists, empty_lists, way_to_compute


def append_group(
    group,
    param_groups,
    state,
    params,
    grads,
    momentum_buffers,
    master_params,
    steps,
    momentum_scales,
    rng_states,
) -> None:
    """Appends the parameters of a group that have a gradient, with gradients and state, to the lists.

    Creates missing state under the conditions of csrc/step.h, and converts momentum if its dtype has to
    change.
    """
    has_momentum = group["momentum"] != 0
    has_step = has_momentum and group["dampening"] != 0
    master_weights = group["master_weights"]
    has_state = has_momentum or master_weights or group["stochastic_rounding"]
    positions: dict[int, int] = {}
    is_checked = False
    for p in group["params"]:
        grad = p.grad
        if grad is None:
            continue
        params.append(p)
        grads.append(grad)
        if not has_state:
            continue
        of_param = state[p]
        if master_weights and p.dtype in HALF:
            master = of_param.get("master_param")
            if master is None:
                weight = p if group["differentiable"] else p.detach()
                master = of_param["master_param"] = weight.to(torch.float32)
            master_params.append(master)
        buffer = None
        if has_momentum:
            buffer = of_param.get("momentum_buffer")
            had_buffer = buffer is not None
            dtype = momentum_dtype(group, p, buffer)
            if not is_checked and (buffer is None or buffer.dtype != dtype):
                check_options(group, param_groups)
                is_checked = True
            if buffer is None:
                new_buffer(of_param, p, dtype)
            elif buffer.dtype != dtype:
                store_momentum(of_param, decoded_momentum(of_param), p, dtype)
            buffer = of_param["momentum_buffer"]
            momentum_buffers.append(buffer)
            if dtype == torch.int8:
                momentum_scales.append(of_param["momentum_scale"])
            if has_step:
                if of_param.get("step") is None:
                    # If dampening was switched on later, the buffer has already had its first update.
                    of_param["step"] = torch.full((), float(had_buffer), dtype=torch.float32, device=p.device)
                steps.append(of_param["step"])
        if needs_rng_state(group, p, buffer):
            if "rng_state" not in of_param:
                if not is_checked:
                    check_options(group, param_groups)
                    is_checked = True
                positions = positions or _positions(param_groups)
                of_param["rng_state"] = new_rng_state(p, group, positions[id(p)])
            rng_states.append(of_param["rng_state"])


def _positions(param_groups) -> dict[int, int]:
    return {id(p): i for i, p in enumerate(p for group in param_groups for p in group["params"])}


def gather_calls(param_groups, append) -> OpCalls:
    """Returns the calls of a step. `append` is :func:`append_group` with an optimizer's state."""
    calls = OpCalls()
    for index, group in enumerate(param_groups):
        params = group["params"]
        # Most groups are on one device. Some optimizers have hundreds of groups of one parameter.
        devices = {p.device for p in params} if len(params) != 1 else (params[0].device,)
        if len(devices) == 1:
            (device,) = devices
            call = calls[(device, *way_to_compute(group, index, device))]
            append(group, *call.lists)
            call.end_group(group, index)
            continue
        ways = {device: way_to_compute(group, index, device) for device in devices}
        lists = empty_lists()
        append(group, *lists)
        for device in dict.fromkeys(p.device for p in lists.params):
            call = calls[(device, *ways[device])]
            call.add_lists(TensorLists(*([t for t in tensors if t.device == device] for tensors in lists)))
            call.end_group(group, index)
    return calls
