"""What this package uses of torch's private API, for what, and which public API could replace it.

LARS also has two members that torch looks for by name: `_step_supports_amp_scaling`, which GradScaler reads,
and `_init_group`, which torch.compile runs without tracing it. If torch changes one of these, tests fail.
"""

from collections.abc import Callable
from operator import attrgetter

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, _use_grad_for_differentiable

# The local tensor of a DTensor. Public: DTensor.to_local(), which goes through autograd. For each parameter
# it costs the host more than the rest of a step.
get_local = attrgetter("_local_tensor")

# Mesh and placements of a DTensor in one object. fully_shard gives a gradient the spec of its parameter, so
# one comparison by identity replaces two. Public: device_mesh and placements.
get_spec = attrgetter("_spec")

# Within it, reading a DTensor's .grad does not look for a __torch_function__, which is disabled for DTensors
# anyway. The look takes twice as long as the rest. torch's manual shows it under this name. Public: none.
without_torch_function = torch._C.DisableTorchFunctionSubclass

# How often a tensor was written in place. Raises RuntimeError for an inference tensor. Public: none.
version_of = attrgetter("_version")

# The base class of batch and instance norms of all dimensions. Public: a list of all of them, which misses
# those that torch adds later.
BATCH_NORM_BASE = nn.modules.batchnorm._NormBase

# FSDP1's mark on flat parameters, and on parameters that are views of them. Public: none.
FSDP1_FLATTENED = "_fsdp_flattened"

# Keeps torch.compile out of a function. Public: torch.compiler.disable, which imports torch._dynamo at the
# decorator and so adds a second to start-up.
disable_dynamo: Callable = torch._disable_dynamo

# Sets grad mode in step() as defaults["differentiable"] asks for, and breaks a traced graph where torch's own
# optimizers do. Public: none.
use_grad_for_differentiable = _use_grad_for_differentiable

# Refuses a step in a CUDA graph capture without capturable=True, with torch's text. Older versions of torch
# have it under the second name. Public: none.
check_graph_capture: Callable[[Optimizer], None] = (
    Optimizer._accelerator_graph_capture_health_check
    if hasattr(Optimizer, "_accelerator_graph_capture_health_check")
    else Optimizer._cuda_graph_capture_health_check
)


def script_class_name(script_object: torch.ScriptObject) -> str:
    """The qualified name of the TorchScript class of an object. Public: none."""
    return script_object._type().qualified_name()


def is_dtensor_like(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor. It does not import torch.distributed.tensor, which takes a second."""
    return hasattr(tensor, "_local_tensor")


def local_of(tensor: Tensor) -> Tensor:
    """Returns the local tensor of a DTensor, and any other tensor as it is."""
    return getattr(tensor, "_local_tensor", tensor)


def first_row(dtensor) -> int:
    """The index in the whole tensor of the first row of a DTensor's local one. Public: none."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    return compute_local_shape_and_global_offset(dtensor.shape, dtensor.device_mesh, dtensor.placements)[1][0]


def is_under_dispatch_mode() -> bool:
    """Whether a TorchDispatchMode, such as a trace with fake tensors, sees all operators. Public: none."""
    return torch._C._len_torch_dispatch_stack() > 0


def has_kernel(op: str, dispatch_key: str) -> bool:
    """Whether an op, by its qualified name, has a kernel of its own for a dispatch key. Public: none."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(op, dispatch_key)


def argument_names(op, kind: str) -> tuple[str, ...]:
    """The names of an op's arguments of one type, such as "FloatType", in the op's order. Public: none."""
    return tuple(a.name for a in op._schema.arguments if a.type.kind() == kind)
