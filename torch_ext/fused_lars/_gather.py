"""Gathers the tensors for a step's op calls, and creates missing state."""

import torch

from ._checks import HALF
from ._op_call import OpCalls, TensorLists, empty_lists, way_to_compute


def append_group(group, state, params, grads, momentum_buffers, master_params, steps) -> None:
    """Appends the parameters of a group that have a gradient, with gradients and state, to the lists.

    Creates missing state under the conditions of csrc/step.h.
    """
    has_momentum = group["momentum"] != 0
    has_step = has_momentum and group["dampening"] != 0
    master_weights = group["master_weights"]
    for p in group["params"]:
        grad = p.grad
        if grad is None:
            continue
        params.append(p)
        grads.append(grad)
        if not has_momentum and not master_weights:
            continue
        of_param = state[p]
        has_master = master_weights and p.dtype in HALF
        if has_master:
            master = of_param.get("master_param")
            if master is None:
                weight = p if group["differentiable"] else p.detach()
                master = of_param["master_param"] = weight.to(torch.float32)
            master_params.append(master)
        if not has_momentum:
            continue
        buffer = of_param.get("momentum_buffer")
        had_buffer = buffer is not None
        if not had_buffer:
            # Zeros, so that the buffer is valid even if AMP skips the first step.
            dtype = torch.float32 if has_master else p.dtype
            buffer = of_param["momentum_buffer"] = torch.zeros_like(
                p, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False
            )
        elif has_master and buffer.dtype in HALF:
            buffer = of_param["momentum_buffer"] = buffer.to(torch.float32)
        momentum_buffers.append(buffer)
        if has_step:
            if of_param.get("step") is None:
                # If dampening was switched on later, the buffer has already had its first update.
                of_param["step"] = torch.full((), float(had_buffer), dtype=torch.float32, device=p.device)
            steps.append(of_param["step"])


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
