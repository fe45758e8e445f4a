"""Parameter groups for LARS. Biases, normalisation and other vectors get no weight decay or adaptation."""

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import nn
from torch.fx import GraphModule
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from ._torch_internals import BATCH_NORM_BASE

__all__ = ["param_groups"]

_NORMALISATION = (
    BATCH_NORM_BASE,  # batch and instance norm
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
)
_NORMALISATION_NAMES = {
    name for name, cls in vars(nn).items() if isinstance(cls, type) and issubclass(cls, _NORMALISATION)
}


def _is_vector_or_bias(name: str, param: nn.Parameter) -> bool:
    is_vector = param.ndim <= 1 and not is_lazy(param)  # a lazy parameter has no shape yet
    return is_vector or name == "bias" or name.startswith("bias_") or name.endswith("_bias")


def _is_norm(module: nn.Module) -> bool:
    # torch.jit and torch.fx replace a module by one that only keeps the name of its class.
    name = None
    if isinstance(module, torch.jit.ScriptModule):
        name = module.original_name
    elif isinstance(module, GraphModule):
        name = type(module).__name__
    return isinstance(module, _NORMALISATION) or name in _NORMALISATION_NAMES


def _has_no_type(module: nn.Module, in_graph: bool) -> bool:
    """Whether torch.export or torch.fx made this module to hold parameters, whatever held them before."""
    kind = type(module)
    return in_graph and (
        kind is nn.Module or kind.__name__ == "GraphModule" or kind.__module__ == "torch.export.unflatten"
    )


def param_groups(
    model: nn.Module | Iterable[nn.Module],
    weight_decay: float = 0.0,
    *,
    exclude: Callable[[str, nn.Parameter], bool] | None = None,
    named: bool = True,
) -> list[dict[str, Any]]:
    """Splits a model's parameters as large-batch recipes do (MLPerf's ResNet reference, BYOL, Barlow Twins).

    Args:
        model: the model, or an iterable of models. With an iterable, the names of parameters begin with the
            index of their model, as in a ``torch.nn.ModuleList``. ``DTensor`` parameters and models of
            ``torch.jit`` are allowed.
        weight_decay: of the first group, finite and >= 0. Default: 0.
        exclude: called with a parameter's full name and the parameter; True puts a weight into the second
            group too.
        named: whether the groups hold pairs of a name and a parameter. Errors and state_dicts then have the
            names. ``torch.distributed.optim.ZeroRedundancyOptimizer`` only takes parameters without names.

    Returns:
        Two groups for :class:`fused_lars.LARS`. Every parameter is in exactly one of them. The first has
        ``weight_decay`` and holds the weights. The second has ``weight_decay=0, layer_adaptation=False`` and
        holds bias and normalisation parameters and all others of at most one dimension (LayerScale's scales,
        PReLU's slopes). A bias is known by its name (``bias``, ``in_proj_bias``, ``bias_ih_l0``). A
        normalisation layer is one of torch's classes or a subclass. The parameters of a parametrization are
        treated like the parameter that they make. A parameter that several modules share is treated as
        ``model.named_parameters()`` first names it. Scales with more dimensions, such as (C, 1, 1) in
        torchvision's ConvNeXt, need ``exclude``.

    Raises:
        TypeError: `model` is something else.
        ValueError: a parameter with several dimensions is in a module of ``torch.export`` or ``torch.fx``
            that no longer tells what it was, and there is no ``exclude`` to decide.
    """
    if not isinstance(model, nn.Module):
        models = list(model) if isinstance(model, Iterable) else [model]
        for module in models:
            if not isinstance(module, nn.Module):
                raise TypeError(
                    f"param_groups got {torch.typename(module)}; allowed: a torch.nn.Module or several"
                )
        model = nn.ModuleList(models)
    in_graph = any(
        isinstance(module, GraphModule) or type(module).__module__ == "torch.export.unflatten"
        for module in model.modules()
    )
    weights: list[Any] = []
    others: list[Any] = []
    seen = set()
    # For each parametrization: the module and the name of the parameter that it makes.
    parametrized: dict[nn.Module, tuple[nn.Module, str]] = {}
    for prefix, module in model.named_modules():
        if is_parametrized(module):
            made_by_name = cast(nn.ModuleDict, module.parametrizations)
            parametrized.update({made: (module, name) for name, made in made_by_name.items()})
        for name, param in module.named_parameters(prefix="", recurse=False):
            if param in seen:
                continue
            seen.add(param)
            full_name = f"{prefix}.{name}" if prefix else name
            owner, meaning = parametrized.get(module, (module, name))
            excluded = _is_vector_or_bias(meaning, param) or _is_norm(owner)
            if exclude is not None:
                excluded = excluded or exclude(full_name, param)
            elif not excluded and _has_no_type(owner, in_graph):
                raise ValueError(
                    f"parameter {full_name!r} of shape {tuple(param.shape)} is in a module of torch.export "
                    "or torch.fx, which keep no type to know a normalisation layer by; pass exclude, a "
                    "function of name and parameter that is True for what is to be left out of decay and "
                    "adaptation"
                )
            (others if excluded else weights).append((full_name, param) if named else param)
    groups: list[dict[str, Any]] = [
        {"params": weights, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0, "layer_adaptation": False},
    ]
    for group in groups if named else ():
        # torch takes an empty group for one without names, and refuses it beside a group with names.
        if not group["params"]:
            group["param_names"] = []
    return groups
